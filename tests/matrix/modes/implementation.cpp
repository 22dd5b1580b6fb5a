// The source file with the implementation, in split mode.
#define WANDB_RESTORE_IMPLEMENTATION
#include "wandb_restore.hpp"
