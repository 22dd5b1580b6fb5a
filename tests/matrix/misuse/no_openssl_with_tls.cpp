// expect: WANDB_RESTORE_NO_OPENSSL does not apply
#ifndef CPPHTTPLIB_OPENSSL_SUPPORT
#define CPPHTTPLIB_OPENSSL_SUPPORT
#endif
#define WANDB_RESTORE_NO_OPENSSL
#include "wandb_restore.hpp"
int main() {}
