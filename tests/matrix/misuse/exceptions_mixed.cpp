// expect: undefined
// mode: bare -DWANDB_RESTORE_SPLIT -fno-exceptions
// stage: link
// This file was built without exceptions; the program's implementation with them.
#include "wandb_restore.hpp"
int main() { return wandb::run_path::parse("e/p/r") ? 0 : 1; }
