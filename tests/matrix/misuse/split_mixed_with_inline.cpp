// expect: undefined
// mode: bare
// stage: link
// This file was built in split mode; the program's other file has the code, but inline.
#define WANDB_RESTORE_SPLIT
#include "wandb_restore.hpp"
int main() { return wandb::run_path::parse("e/p/r") ? 0 : 1; }
