// The only source file of wandb_restore::compiled. The build defines WANDB_RESTORE_SPLIT.
#define WANDB_RESTORE_IMPLEMENTATION
#include "wandb_restore.hpp"
