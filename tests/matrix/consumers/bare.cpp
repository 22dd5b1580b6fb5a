// As main.cpp, without OpenSSL: the program uses its own transport, and links no library.
#define WANDB_RESTORE_NO_OPENSSL
#include "wandb_restore.hpp"

#include <fstream>
#include <iostream>

struct no_transport {
  wandb::result<wandb::http_response> send(const wandb::http_request&, wandb::body_sink&) {
    return wandb::error(wandb::errc::connection_failed, "there is no network here");
  }
};

int main() {
  std::ofstream("kept.txt") << "kept";
  wandb::client<no_transport> client(wandb::settings::from_environment(), no_transport{});
  const auto file = client.try_restore("kept.txt", "entity/project/run");
  const auto other = client.try_restore("other.txt", "entity/project/run");
  if (!file || other || other.error().code() != wandb::errc::connection_failed) return 1;
  std::cout << WANDB_RESTORE_VERSION << " bare " << file->name() << ' ' << file->size() << '\n';
  return file->size() == 4 ? 0 : 1;
}
