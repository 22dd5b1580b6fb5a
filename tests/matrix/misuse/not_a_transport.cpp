// expect: a Transport has a member
// mode: bare
#include "wandb_restore.hpp"
struct no_transport {
  int send(const wandb::http_request&) { return 0; }
};
int main() { wandb::client<no_transport> client; }
