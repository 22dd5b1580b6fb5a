// expect: undefined
// mode: bare
// stage: link
// This file is compiled in split mode; the other file contains the implementation inline.
#define WANDB_RESTORE_SPLIT
#include "wandb_restore.hpp"
int main() { return wandb::run_path::parse("e/p/r") ? 0 : 1; }
