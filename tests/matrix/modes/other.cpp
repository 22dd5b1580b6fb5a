// A second source file that includes the header. It defines a transport and a cache rule; in split mode it sees only the
// declarations of the library.
#include "shared.hpp"

namespace matrix {

namespace {

/// The transport in memory with an additional member, which the library does not know.
class counting_transport {
 public:
  explicit counting_transport(memory_transport::state& of, int& exchanges)
      : memory_(of), exchanges_(&exchanges) {}
  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    ++*exchanges_;
    return memory_.send(request, sink);
  }

 private:
  memory_transport memory_;
  int* exchanges_;
};

}  // namespace

wandb::result<wandb::restored_file> restore_elsewhere(const scratch& folder) {
  memory_transport::state state;
  state.files["elsewhere.txt"] = {10, {}};
  int exchanges = 0, asked = 0;
  const auto rule = [&asked](const wandb::local_copy& local, const wandb::file_info* remote) {
    ++asked;
    if (remote == nullptr) return wandb::cache_policy::verdict::ask;
    return remote->size == local.size ? wandb::cache_policy::verdict::keep
                                      : wandb::cache_policy::verdict::fetch;
  };
  wandb::client<counting_transport> client(memory_settings(folder), counting_transport(state, exchanges),
                                           rule);
  auto first = client.try_restore("elsewhere.txt");
  check(first && exchanges == 2 && asked == 0, "a second file's transport is used");
  auto second = client.try_restore("elsewhere.txt");
  check(second && exchanges == 3 && asked == 2 && second->source() == wandb::source::local,
        "a second file's rule is asked");
  return first;
}

#if WANDB_RESTORE_EXCEPTIONS
void throw_elsewhere() {
  wandb::result<int>(wandb::error(wandb::errc::offline, "thrown by a second file")).value();
}
#endif

}  // namespace matrix
