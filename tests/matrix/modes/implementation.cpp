// In split mode, the one source file that brings the code.
#define WANDB_RESTORE_IMPLEMENTATION
#include "wandb_restore.hpp"
