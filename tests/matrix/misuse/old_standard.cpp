// expect: wandb_restore.hpp needs C++17
// mode: bare -std=c++14
#include "wandb_restore.hpp"
int main() {}
