// expect: undefined
// mode: bare -DWANDB_RESTORE_SPLIT -fno-exceptions
// stage: link
// This file is compiled without exceptions, the implementation with exceptions.
#include "wandb_restore.hpp"
int main() { return wandb::run_path::parse("e/p/r") ? 0 : 1; }
