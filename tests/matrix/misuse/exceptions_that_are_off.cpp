// expect: WANDB_RESTORE_EXCEPTIONS is 1, but
// mode: bare -fno-exceptions
#define WANDB_RESTORE_EXCEPTIONS 1
#include "wandb_restore.hpp"
int main() {}
