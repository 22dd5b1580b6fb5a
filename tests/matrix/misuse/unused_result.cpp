// expect: nodiscard
// mode: bare -Werror
#include "wandb_restore.hpp"
int main() { wandb::run_path::parse("e/p/r"); }
