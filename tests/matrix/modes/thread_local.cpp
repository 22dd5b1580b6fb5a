// Whether objects of threads that have destructors work at all, which MinGW's GCC gets wrong: it frees them first. Newer
// versions of cpp-httplib have such objects. Without our header.
#include <cstdio>
#include <regex>
#include <string>
#include <thread>
#include <vector>

bool matches(const std::string& text) {
  thread_local const std::regex expression("(HTTP/1\\.[01]) (\\d{3})(?: (.*?))?\r?\n");
  return std::regex_match(text, expression);
}

int main() {
  for (int round = 0; round < 20; ++round) {
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) threads.emplace_back([] { matches("HTTP/1.1 200 OK\r\n"); });
    for (auto& one : threads) one.join();
    std::vector<std::string> more;
    for (std::size_t i = 0; i < 1000; ++i) more.emplace_back(i % 100, 'x');
  }
  std::puts("ok");
}
