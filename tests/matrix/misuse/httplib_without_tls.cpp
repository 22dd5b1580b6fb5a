// expect: httplib.h was included without CPPHTTPLIB_OPENSSL_SUPPORT
#undef CPPHTTPLIB_OPENSSL_SUPPORT
#include <httplib.h>
#include "wandb_restore.hpp"
int main() {}
