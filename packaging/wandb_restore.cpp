// The one source file of wandb_restore::compiled; WANDB_RESTORE_SPLIT comes from the build.
#define WANDB_RESTORE_IMPLEMENTATION
#include "wandb_restore.hpp"
