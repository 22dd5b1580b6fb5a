// The digest, and the parsers of external text: addresses, dates, ranges, encodings.
//
// These functions are in the implementation part of the header: this file compiles it inline, in the inline namespace of that
// build mode. The rest of the program is not affected.
#undef WANDB_RESTORE_SPLIT
#include "wandb_restore.hpp"

#include <doctest/doctest.h>
#include <openssl/evp.h>

#include <ctime>
#include <optional>
#include <random>
#include <string>
#include <string_view>

#include "support.hpp"

namespace {

namespace detail = wandb::detail;
using namespace std::string_literals;

std::string md5_of(std::string_view text) {
  detail::md5 hash;
  hash.update(text);
  return hash.finish();
}

std::string openssl_md5(std::string_view text) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  REQUIRE(EVP_Digest(text.data(), text.size(), digest, &size, EVP_md5(), nullptr) == 1);
  return detail::hex_encode({reinterpret_cast<const char*>(digest), size});
}

std::string random_bytes(std::size_t size, unsigned seed) {
  std::minstd_rand random(seed);
  std::string bytes(size, '\0');
  for (char& c : bytes) c = static_cast<char>(random() >> 8);
  return bytes;
}

}  // namespace

TEST_SUITE("digest") {
  TEST_CASE("MD5: the vectors of RFC 1321, section A.5") {
    CHECK(md5_of("") == "d41d8cd98f00b204e9800998ecf8427e");
    CHECK(md5_of("a") == "0cc175b9c0f1b6a831c399e269772661");
    CHECK(md5_of("abc") == "900150983cd24fb0d6963f7d28e17f72");
    CHECK(md5_of("message digest") == "f96b697d7cb7938d525a2f31aaf161d0");
    CHECK(md5_of("abcdefghijklmnopqrstuvwxyz") == "c3fcd3d76192e4007dfb496cca67e13b");
    CHECK(md5_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789") ==
          "d174ab98d277d9f5a5611c2c9f419d9f");
    CHECK(md5_of("12345678901234567890123456789012345678901234567890123456789012345678901234567890") ==
          "57edf4a22be3c955ac49da2e2107b67a");
  }

  TEST_CASE("MD5: every length up to 200, split at every point, equals OpenSSL's") {
    const std::string data = random_bytes(200, 1);
    bool all_equal = true;
    for (std::size_t length = 0; length <= data.size(); ++length) {
      const std::string_view text = std::string_view(data).substr(0, length);
      const std::string expected = openssl_md5(text);
      for (std::size_t cut = 0; cut <= length; ++cut) {
        detail::md5 hash;
        hash.update(text.substr(0, cut));
        hash.update(text.substr(cut));
        all_equal = all_equal && hash.finish() == expected;
      }
    }
    CHECK(all_equal);
  }

  TEST_CASE("MD5: random data in random pieces equals OpenSSL's") {
    std::minstd_rand random(2);
    for (unsigned round = 0; round < 20; ++round) {
      const std::string data = random_bytes(random() % 300000, round);
      detail::md5 hash;
      for (std::string_view rest = data; !rest.empty();) {
        const auto count = (std::min)(rest.size(), static_cast<std::size_t>(random() % 5000));
        hash.update(rest.substr(0, count));
        rest.remove_prefix(count);
      }
      CHECK(hash.finish() == openssl_md5(data));
    }
  }

  TEST_CASE("MD5 of a file; empty if the file cannot be read") {
    const support::temporary_directory directory;
    const std::string data = random_bytes(700001, 3);
    support::write_file(directory / "data", data);
    CHECK(detail::md5_of_file(directory / "data") == openssl_md5(data));
    CHECK(detail::md5_of_file(directory / "missing").empty());
    CHECK(detail::md5_of_file(directory.path()).empty());
  }
}

TEST_SUITE("text") {
  TEST_CASE("hex: upper and lower case are read, lower case is written, other characters are refused") {
    CHECK(detail::hex_encode("\x00\x7f\xff"s) == "007fff");
    CHECK(detail::hex_decode("00fFAb") == "\x00\xff\xab"s);
    CHECK(detail::hex_decode("") == ""s);
    for (const char* bad : {"0", "0g", "+1", "-1", " 1", "1 ", "0x"}) {
      CAPTURE(std::string(bad));
      CHECK_FALSE(detail::hex_decode(bad));
    }
  }

  TEST_CASE("base64: RFC 4648, section 10, both ways") {
    const struct {
      const char *plain, *encoded;
    } rows[] = {{"", ""},
                {"f", "Zg=="},
                {"fo", "Zm8="},
                {"foo", "Zm9v"},
                {"foob", "Zm9vYg=="},
                {"fooba", "Zm9vYmE="},
                {"foobar", "Zm9vYmFy"}};
    for (const auto& row : rows) {
      CAPTURE(std::string(row.plain));
      CHECK(detail::base64_encode(row.plain) == row.encoded);
      CHECK(detail::base64_decode(row.encoded) == row.plain);
    }
    for (std::size_t size = 0; size < 100; ++size) {
      const std::string bytes = random_bytes(size, 4);
      CHECK(detail::base64_decode(detail::base64_encode(bytes)) == bytes);
    }
  }

  TEST_CASE("base64: malformed input is refused") {
    for (const char* bad :
         {"Zg", "Zg=", "Zm9v=", "====", "Z===", "Zm=v", "Zm9v\n", " Zm9v", "Zm9-", "Zm9_", "Zg==Zg=="}) {
      CAPTURE(std::string(bad));
      CHECK_FALSE(detail::base64_decode(bad));
    }
    CHECK_FALSE(detail::base64_decode(std::string_view("Zm9\0", 4)));
  }

  TEST_CASE("percent-encoding keeps only the unreserved characters") {
    CHECK(detail::percent_encode("azAZ09-._~") == "azAZ09-._~");
    CHECK(detail::percent_encode("a b/c?d%e+f\xc3\xa9") == "a%20b%2Fc%3Fd%25e%2Bf%C3%A9");
    CHECK(detail::percent_encode("a/b c", "/") == "a/b%20c");
    CHECK(detail::percent_encode("\0"s) == "%00");
    CHECK(detail::percent_decode("a%20b%2fC%2F+") == "a b/C/+");
    CHECK(detail::percent_decode("%41") == "A");
    for (const char* bad : {"%", "a%", "%4", "a%4", "%zz", "%-1", "%+1", "% 1"}) {
      CAPTURE(std::string(bad));
      CHECK_FALSE(detail::percent_decode(bad));
    }
    std::string all;
    for (int c = 0; c < 256; ++c) all += static_cast<char>(c);
    CHECK(detail::percent_decode(detail::percent_encode(all)) == all);
  }

  TEST_CASE("texts for people: quotes, control characters, length, sizes") {
    CHECK(detail::in_quotes("a \"b\" \\ \n\x1b[31m") == "\"a \\\"b\\\" \\\\ \\x0a\\x1b[31m\"");
    CHECK(detail::in_quotes(std::string(300, 'x')) == '"' + std::string(200, 'x') + "...\"");
    CHECK(detail::readable_bytes(0) == "0 bytes");
    CHECK(detail::readable_bytes(1023) == "1023 bytes");
    CHECK(detail::readable_bytes(1024) == "1.0 KiB");
    CHECK(detail::readable_bytes(std::uint64_t{5} << 40) == "5.0 TiB");
  }

  TEST_CASE("a proxy whose password has an unescaped / ? or # is refused, and not shown") {
    for (const char* text :
         {"http://user:12/34secret@proxy:3128", "user:1?secret@proxy", "http://u:1#secret@proxy:1"}) {
      CAPTURE(std::string(text));
      const auto proxy = detail::parse_proxy(text);
      REQUIRE_FALSE(proxy.has_value());
      CHECK(std::string(proxy.error().what()).find("secret") == std::string::npos);
    }
    CHECK(detail::parse_proxy("http://user:12%2F34@proxy:3128")->host == "proxy");
    CHECK(detail::parse_proxy("proxy:3128/")->port == 3128);
  }

  TEST_CASE("a text that quotes addresses is shown without their queries") {
    CHECK(detail::without_queries(
              "Get \"https://s.test/a?X-Goog-Signature=SECRET\": timeout, see http://h/b#c d?e") ==
          "Get \"https://s.test/a?***\": timeout, see http://h/b?*** d?e");
    CHECK(detail::without_queries("https://h/a?b") == "https://h/a?***");
    CHECK(detail::without_queries("no address?") == "no address?");
    CHECK(detail::without_queries("") == "");
  }

  TEST_CASE("addresses for people: without a password, without a query, without a fragment") {
    const struct {
      const char *text, *shown;
    } rows[] = {
        {"https://host/a/b?X-Signature=1#x", "https://host/a/b"},
        {"https://host/a#secret?", "https://host/a"},
        {"https://user:secret@host/a", "https://...@host/a"},
        {"https://user:sec/ret@host/a", "https://...@host/a"},
        {"https://user:sec?ret@host/a", "https://..."},
        {"http://me@corp.test:pa/ss@proxy:3128", "http://...@proxy:3128"},
        {"http://me@corp.test:pa?ss@proxy:3128", "http://..."},
        {"s3://key:secret@bucket/a?b", "s3://...@bucket/a"},
        {"user:secret@host:80", "...@host:80"},
        {"entity/project/run?token=secret", "entity/project/run"},
        {"https://host/a?b=c@d", "https://host/a"},
        {"a/b?X-Amz-Signature=SECRET&next=https://h/p", "a/b"},
        {"https://host:443/a?b=c@d", "https://..."},  // perhaps a password: "443/a?b=c"
        {"https://user:sec/r?et@host/a", "https://..."},
        {"user:sec/r?et@host:80", "..."},
        {"", ""},
    };
    for (const auto& row : rows) {
      CAPTURE(std::string(row.text));
      CHECK(detail::redacted_address(row.text) == row.shown);
    }
  }

  TEST_CASE("first words of a server's text: without keys, and without queries and users of addresses") {
    const struct {
      const char *text, *shown;
    } rows[] = {
        {"see https://host/a?X-Signature=1 now", "see https://host/a*** now"},
        {"see https://host/a?secret now", "see https://host/a now"},
        {"see https://user:secret@host/a now", "see https://...@host/a now"},
        {"see https://user:secret@host/a?b=c now", "see https://...@host/a*** now"},
        {"token=secret?x now", "*** now"},
        {"is it 0123456789abcdefghij ?", "is it *** ?"},
        {"is it 0123456789abcdefghi?", "is it 0123456789abcdefghi?"},
    };
    for (const auto& row : rows) {
      CAPTURE(std::string(row.text));
      CHECK(detail::first_words(row.text) == row.shown);
    }
  }

  TEST_CASE("JSON: null for malformed texts, and for texts nested too deeply") {
    const auto nested = [](std::size_t depth, const char* open, const char* close) {
      std::string text;
      for (std::size_t i = 0; i < depth; ++i) text += open;
      text += "1";
      for (std::size_t i = 0; i < depth; ++i) text += close;
      return text;
    };
    CHECK(detail::parse_json("{\"a\": [1]}")->is_object());
    CHECK(detail::parse_json("{\"a\": [1]")->is_null());
    CHECK(detail::parse_json("")->is_null());
    CHECK(detail::parse_json(nested(64, "[", "]"))->is_array());
    CHECK(detail::parse_json(nested(65, "[", "]"))->is_null());
    CHECK(detail::parse_json(nested(32, "[{\"a\":", "}]"))->is_array());
    CHECK(detail::parse_json(nested(33, "[{\"a\":", "}]"))->is_null());
    CHECK(detail::parse_json(nested(100'000, "{\"a\":", "}"))->is_null());
    const auto list = [](std::size_t values) {
      std::string text = "[0";  // the list is a value, too
      while (--values > 1) text += ",0";
      return text + ']';
    };
    CHECK(detail::elements(*detail::parse_json(list(131'072))).size() == 131'071);
    CHECK(detail::parse_json(list(131'073))->is_null());
    const std::string longest(65'536, 'x');
    CHECK(detail::text_of(*detail::parse_json('"' + longest + '"')) == longest);
    CHECK(detail::parse_json('"' + longest + "x\"")->is_null());
    CHECK(detail::parse_json("{\"" + longest + "x\":0}")->is_null());
    CHECK(detail::text_of(detail::member(*detail::parse_json(R"({"a":{"b":[1]},"a":"last"})"), "a")) ==
          "last");
    CHECK(detail::parse_json(std::string(1'000'000, '['))->is_null());
    // Brackets in strings do not count, also after escaped quotes.
    const std::string text = "\"\\\"" + std::string(100, '[') + "\\\\\"";
    CHECK(detail::text_of(*detail::parse_json(text)) == "\"" + std::string(100, '[') + "\\");
    CHECK(detail::parse_json("[[],[],{}," + text + "]")->is_array());
  }

  TEST_CASE("JSON strings: what nlohmann/json reads is the text, with U+FFFD for bytes that are not UTF-8") {
    const struct {
      std::string text, read;
    } rows[] = {
        {"", ""},
        {"a\"b\\c/", "a\"b\\c/"},
        {"\0\x01\n\t\x1f\x7f"s, "\0\x01\n\t\x1f\x7f"s},
        {"\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80", "\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"},
        {"\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf", "\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf"},
        {"a\x80z", "a\xef\xbf\xbdz"},                                              // a continuation alone
        {"\xc3", "\xef\xbf\xbd"},                                                  // cut
        {"\xe2\x82", "\xef\xbf\xbd\xef\xbf\xbd"},                                  // cut
        {"\xc0\xaf", "\xef\xbf\xbd\xef\xbf\xbd"},                                  // overlong
        {"\xe0\x9f\xbf", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},                  // overlong
        {"\xf0\x8f\xbf\xbf", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},  // overlong
        {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},                  // a surrogate
        {"\xf4\x90\x80\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},  // beyond U+10FFFF
        {"\xff", "\xef\xbf\xbd"},
    };
    for (const auto& row : rows) {
      CAPTURE(row.read);
      const auto parsed = nlohmann::json::parse(detail::json_string(row.text), nullptr, false);
      REQUIRE(parsed.is_string());
      CHECK(parsed.get<std::string>() == row.read);
    }
  }

  TEST_CASE("JSON values are written as they were read") {
    const std::string text =
        R"({"a": [1, -2, 0.1, 1e300, true, false, null, "x\"y", []], "b": {}, "c": {"d": {"e": 18446744073709551615}}})";
    const auto parsed = detail::parse_json(text);
    const std::string written = detail::json_of(*parsed, 0);
    CHECK(nlohmann::json::parse(written) == nlohmann::json::parse(text));
    CHECK(written.find("\n  \"c\": {\n    \"d\": {\n      \"e\": 1") != std::string::npos);
  }

  TEST_CASE("numbers: the whole text must be digits, and the value must fit") {
    const struct {
      std::string text;
      unsigned base;
      std::optional<std::uint64_t> means;
    } rows[] = {
        {"0", 10, 0},
        {"007", 10, 7},
        {"18446744073709551615", 10, UINT64_MAX},
        {"18446744073709551616", 10, std::nullopt},
        {"99999999999999999999", 10, std::nullopt},
        {"", 10, std::nullopt},
        {"+1", 10, std::nullopt},
        {"-1", 10, std::nullopt},
        {" 1", 10, std::nullopt},
        {"1 ", 10, std::nullopt},
        {"1a", 10, std::nullopt},
        {"fF", 16, 255},
        {"ffffffffffffffff", 16, UINT64_MAX},
        {"10000000000000000", 16, std::nullopt},
        {"g", 16, std::nullopt},
        {"[", 16, std::nullopt},  // between 'Z' and 'a', as `
        {"`", 16, std::nullopt},
        {":", 16, std::nullopt},
        {"@", 16, std::nullopt},
        {"\xc3", 16, std::nullopt},
    };
    for (const auto& row : rows) {
      CAPTURE(row.text);
      CHECK(detail::to_number(row.text, row.base) == row.means);
    }
  }

  TEST_CASE("the service's md5: base64 or hex of 16 bytes; other texts mean unknown") {
    const std::string hex = "900150983cd24fb0d6963f7d28e17f72";
    const struct {
      std::string told, means;
    } rows[] = {
        {"kAFQmDzST7DWlj99KOF/cg==", hex},
        {hex, hex},
        {"900150983CD24FB0D6963F7D28E17F72", hex},
        {"", ""},
        {"0", ""},
        {"junk", ""},
        {"kAFQmDzST7DWlj99KOF/cg", ""},            // padding is missing
        {"kAFQmDzST7DWlj99KOF/", ""},              // 15 bytes
        {"kAFQmDzST7DWlj99KOF/cgA=", ""},          // 17 bytes
        {"g00150983cd24fb0d6963f7d28e17f72", ""},  // 32 characters of base64, not hex
        {"900150983cd24fb0d6963f7d28e17f7", ""},
        {"900150983cd24fb0d6963f7d28e17f72 ", ""},
    };
    for (const auto& row : rows) {
      CAPTURE(std::string(row.told));
      CHECK(detail::normalised_md5(row.told) == row.means);
    }
  }

  TEST_CASE("HTTP dates: the preferred form of RFC 9110, section 5.6.7") {
    const struct {
      const char* text;
      std::optional<std::uint64_t> time;
    } rows[] = {
        {"Sun, 06 Nov 1994 08:49:37 GMT", 784111777},    {"Thu, 01 Jan 1970 00:00:00 GMT", 0},
        {"Thu, 29 Feb 2024 12:00:00 GMT", 1709208000},   {"Fri, 31 Dec 1999 23:59:59 GMT", 946684799},
        {"Sat, 01 Mar 2400 00:00:00 GMT", 13574649600},  {"Sunday, 06-Nov-94 08:49:37 GMT", std::nullopt},
        {"Sun Nov  6 08:49:37 1994", std::nullopt},      {"Sun, 06 Nov 1994 08:49:37 UTC", std::nullopt},
        {"Sun, 06 Nox 1994 08:49:37 GMT", std::nullopt}, {"Sun, 06 anF 1994 08:49:37 GMT", std::nullopt},
        {"Sun, xx Nov 1994 08:49:37 GMT", std::nullopt}, {"", std::nullopt},
    };
    for (const auto& row : rows) {
      CAPTURE(std::string(row.text));
      CHECK(detail::parse_http_date(row.text) == row.time);
    }
    std::mt19937_64 random(5);
    for (int i = 0; i < 2000; ++i) {
      const auto time = static_cast<std::time_t>(random() % 16725225600);  // up to the year 2500
      std::tm parts{};
      REQUIRE(gmtime_r(&time, &parts) != nullptr);
      char text[64];
      REQUIRE(std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &parts) == 29);
      REQUIRE(detail::parse_http_date(text) == static_cast<std::uint64_t>(time));
    }
  }

  TEST_CASE("Retry-After: seconds or a date; a past or malformed time means now") {
    const auto milliseconds_of = [](const char* value) {
      wandb::http_response head;
      if (value) head.headers = {{"retry-after", value}};
      return detail::parse_retry_after(head).count();
    };
    const struct {
      const char* value;
      std::int64_t means;
    } rows[] = {{nullptr, 0},
                {"0", 0},
                {"1", 1000},
                {" 120 ", 120000},
                {"1.5", 2000},
                {"-1", 0},
                {"soon", 0},
                {"", 0},
                {"1x", 0},
                {"1e3", 0},
                {"999999999", 86400000},
                {"Sun, 06 Nov 1994 08:49:37 GMT", 0}};
    for (const auto& row : rows) {
      CAPTURE(std::string(row.value ? row.value : "(none)"));
      CHECK(milliseconds_of(row.value) == row.means);
    }
    const std::time_t later = std::time(nullptr) + 100;
    std::tm parts{};
    REQUIRE(gmtime_r(&later, &parts) != nullptr);
    char text[64];
    std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &parts);
    CHECK(milliseconds_of(text) <= 100000);
    CHECK(milliseconds_of(text) > 50000);
  }

  TEST_CASE("Content-Range: bytes first-last/size; the size * means unknown") {
    const struct {
      const char* text;
      bool good;
      std::uint64_t begin, end;
      std::optional<std::uint64_t> size;
    } rows[] = {
        {"bytes 0-0/1", true, 0, 1, 1},
        {"bytes 5-9/10", true, 5, 10, 10},
        {"Bytes 5-9/*", true, 5, 10, std::nullopt},
        {" bytes  5 - 9 / 10 ", true, 5, 10, 10},
        {"bytes 0-18446744073709551614/18446744073709551615", true, 0, UINT64_MAX, UINT64_MAX},
        {"bytes */10", false, 0, 0, {}},
        {"bytes 9-5/10", false, 0, 0, {}},
        {"bytes 5-/10", false, 0, 0, {}},
        {"bytes -5/10", false, 0, 0, {}},
        {"bytes 5-9", false, 0, 0, {}},
        {"bytes 5-9/", false, 0, 0, {}},
        {"bytes 5-9/ten", false, 0, 0, {}},
        {"bytes 5-9/-10", false, 0, 0, {}},
        {"bytes 0-18446744073709551615/*", false, 0, 0, {}},  // its end would overflow to 0
        {"bytes 0-18446744073709551616/*", false, 0, 0, {}},
        {"bytes=5-9/10", false, 0, 0, {}},
        {"lines 5-9/10", false, 0, 0, {}},
        {"bytes", false, 0, 0, {}},
        {"", false, 0, 0, {}},
        {"5-9/10", false, 0, 0, {}},
    };
    for (const auto& row : rows) {
      CAPTURE(std::string(row.text));
      const auto range = detail::content_range::parse(row.text);
      REQUIRE((range.bytes.end != 0) == row.good);
      CHECK(range.bytes.begin == row.begin);
      CHECK(range.bytes.end == row.end);
      CHECK(range.size == row.size);
    }
  }
}

TEST_SUITE("addresses") {
  TEST_CASE("an address is split into its parts") {
    const struct {
      const char *text, *whole, *host;
      int port;
      const char* target;
    } rows[] = {
        {"https://API.wandb.ai", "https://api.wandb.ai/", "api.wandb.ai", 443, "/"},
        {"HTTP://h:8080/a/b?c=d#e", "http://h:8080/a/b?c=d", "h", 8080, "/a/b?c=d"},
        {"https://h:443/", "https://h/", "h", 443, "/"},
        {"http://h:443/", "http://h:443/", "h", 443, "/"},
        {"http://h:/x", "http://h/x", "h", 80, "/x"},
        {"http://h?q", "http://h/?q", "h", 80, "/?q"},
        {"http://h#f", "http://h/", "h", 80, "/"},
        {"http://[::1]:9/x", "http://[::1]:9/x", "::1", 9, "/x"},
        {"http://[FE80::A]/", "http://[fe80::a]/", "fe80::a", 80, "/"},
        {"http://u:p@h/x", "http://h/x", "h", 80, "/x"},
        {"http://u@x:p@h/x", "http://h/x", "h", 80, "/x"},
        {"http://h/a b\xc3\xa9?\xc3\xa9 %20", "http://h/a%20b%C3%A9?%C3%A9%20%20", "h", 80,
         "/a%20b%C3%A9?%C3%A9%20%20"},
        {"http://h/a?b?c", "http://h/a?b?c", "h", 80, "/a?b?c"},
    };
    for (const auto& row : rows) {
      CAPTURE(std::string(row.text));
      const auto parsed = wandb::url::parse(row.text);
      REQUIRE(parsed.has_value());
      CHECK(parsed->str() == row.whole);
      CHECK(parsed->host == row.host);
      CHECK(parsed->port == row.port);
      CHECK(parsed->target == row.target);
      CHECK(parsed->redacted().find('?') == std::string::npos);
    }
  }

  TEST_CASE("a malformed address is a protocol_violation, reported without its query") {
    for (const char* text : {"",
                             "h",
                             "/a/b",
                             "ftp://h/",
                             "file:///etc/passwd",
                             "https:/h",
                             "http://",
                             "http:///x",
                             "http://:80/",
                             "http://h:0/",
                             "http://h:65536/",
                             "http://h:x/",
                             "http://h:-1/",
                             "http://[::1/",
                             "http://[x]/",
                             "http://[::1]xy/",
                             "http://a b/",
                             "http://a\"b/",
                             "http://a%41/",
                             "http://h/\r\nX: y?secret=1",
                             "http://h/\x7f",
                             "gopher://h/?secret=1",
                             "https://u:secret?x@h:x/",
                             "https://u:secret/x@h:x/",
                             "https://u:p#secret@h:x/"}) {
      CAPTURE(std::string(text));
      const auto parsed = wandb::url::parse(text);
      REQUIRE_FALSE(parsed.has_value());
      CHECK(parsed.error().code() == wandb::errc::protocol_violation);
      CHECK(std::string(parsed.error().what()).find("secret") == std::string::npos);
    }
    CHECK_FALSE(wandb::url::parse("http://h/\0"s).has_value());
  }

  TEST_CASE("numbers of JSON: integers with and without a sign, fractions; 0 for other values") {
    using wandb::detail::json;
    CHECK(wandb::detail::number_of(json(5u)) == 5);
    CHECK(wandb::detail::number_of(json(-5)) == -5);
    CHECK(wandb::detail::number_of(json(0.5)) == 0.5);
    CHECK(wandb::detail::number_of(json("5")) == 0);
  }

  TEST_CASE("a host beyond ASCII is refused, with a hint at its xn-- form") {
    for (const char* text : {"https://b\xc3\xbc"
                             "cher.example/",
                             "http://\xff/?secret=1", "http://a\x80:80/"}) {
      CAPTURE(std::string(text));
      const auto parsed = wandb::url::parse(text);
      REQUIRE_FALSE(parsed.has_value());
      CHECK(parsed.error().code() == wandb::errc::protocol_violation);
      CHECK(std::string(parsed.error().what()).find("xn--") != std::string::npos);
      CHECK(std::string(parsed.error().what()).find("secret") == std::string::npos);
    }
    const auto encoded = wandb::url::parse("https://xn--bcher-kva.example/b\xc3\xbc"
                                           "cher");
    REQUIRE(encoded.has_value());
    CHECK(encoded->str() == "https://xn--bcher-kva.example/b%C3%BCcher");
  }

  TEST_CASE("a character between an IPv6 host and the path is refused") {
    CHECK_FALSE(wandb::url::parse("http://[::1]x/").has_value());
  }

  TEST_CASE("references: RFC 3986, section 5.4") {
    const auto base = wandb::url::parse("http://a/b/c/d;p?q");
    REQUIRE(base.has_value());
    const struct {
      const char *reference, *means;
    } rows[] = {
        // 5.4.1, normal examples; a fragment is dropped
        {"g", "http://a/b/c/g"},
        {"./g", "http://a/b/c/g"},
        {"g/", "http://a/b/c/g/"},
        {"/g", "http://a/g"},
        {"//g", "http://g/"},
        {"?y", "http://a/b/c/d;p?y"},
        {"g?y", "http://a/b/c/g?y"},
        {"#s", "http://a/b/c/d;p?q"},
        {"g#s", "http://a/b/c/g"},
        {"g?y#s", "http://a/b/c/g?y"},
        {";x", "http://a/b/c/;x"},
        {"g;x", "http://a/b/c/g;x"},
        {"g;x?y#s", "http://a/b/c/g;x?y"},
        {"", "http://a/b/c/d;p?q"},
        {".", "http://a/b/c/"},
        {"./", "http://a/b/c/"},
        {"..", "http://a/b/"},
        {"../", "http://a/b/"},
        {"../g", "http://a/b/g"},
        {"../..", "http://a/"},
        {"../../", "http://a/"},
        {"../../g", "http://a/g"},
        // 5.4.2, abnormal examples
        {"../../../g", "http://a/g"},
        {"../../../../g", "http://a/g"},
        {"/./g", "http://a/g"},
        {"/../g", "http://a/g"},
        {"g.", "http://a/b/c/g."},
        {".g", "http://a/b/c/.g"},
        {"g..", "http://a/b/c/g.."},
        {"..g", "http://a/b/c/..g"},
        {"./../g", "http://a/b/g"},
        {"./g/.", "http://a/b/c/g/"},
        {"g/./h", "http://a/b/c/g/h"},
        {"g/../h", "http://a/b/c/h"},
        {"g;x=1/./y", "http://a/b/c/g;x=1/y"},
        {"g;x=1/../y", "http://a/b/c/y"},
        {"g?y/./x", "http://a/b/c/g?y/./x"},
        {"g?y/../x", "http://a/b/c/g?y/../x"},
        {"g#s/./x", "http://a/b/c/g"},
        // references of real servers
        {"https://Other:444/x?y", "https://other:444/x?y"},
        {"/a//b", "http://a/a//b"},
        {"/x?u=http://v/", "http://a/x?u=http://v/"},
        {"./x:y", "http://a/b/c/x:y"},
    };
    for (const auto& row : rows) {
      CAPTURE(std::string(row.reference));
      const auto resolved = base->resolve(row.reference);
      REQUIRE(resolved.has_value());
      CHECK(resolved->str() == row.means);
    }
    for (const char* refused : {"g:h", "ftp://h/", "javascript:alert(1)", "//", "http://", "/\n"}) {
      CAPTURE(std::string(refused));
      CHECK_FALSE(base->resolve(refused).has_value());
    }
  }
}

TEST_CASE("names that Windows accepts for files") {
  for (const char* name :
       {"a", "model.h5", ".hidden", "com", "com10", "console", "nullable.txt", "a b", "\xc3\xa4"}) {
    CAPTURE(std::string(name));
    CHECK(wandb::detail::is_windows_name(name));
  }
  for (const char* name : {"media:v0", "a?", "a*", "\"a\"", "a<b", "a>b", "a|b", "tab\tbed", "nul", "NUL",
                           "con.txt", "Aux.tar.gz", "com1", "LPT9.log", "dot.", "space ", "prn ."}) {
    CAPTURE(std::string(name));
    CHECK_FALSE(wandb::detail::is_windows_name(name));
  }
}
