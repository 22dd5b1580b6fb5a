// Runs the small examples against the stand-in, and checks their output.
// SPDX-License-Identifier: MIT
#ifndef _WIN32
#include "cli_test.hpp"

namespace {

using namespace programs;

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_SUITE("examples") {
  TEST_CASE("quickstart") {
    fixture f;
    f.server.add_file(f.run, "model-best.h5", "twelve bytes");
    const outcome result = f.start("quickstart", {});
    CHECK(result.status == 0);
    CHECK(contains(result.out, "model-best.h5: 12 bytes, verified\n"));
    CHECK(result.err == "");

    const outcome missing = f.start("quickstart", {"nothing.h5", f.run_path()});
    CHECK(missing.status == 1);
    CHECK(contains(missing.err, "nothing.h5"));

    // The first program of the README is this example.
    const fs::path top = fs::path(__FILE__).parent_path().parent_path();
    CHECK(contains(read_file(top / "README.md"),
                   "```cpp\n" + read_file(top / "examples" / "quickstart.cpp") + "```\n"));
  }

  TEST_CASE("resume_training: resumes from a checkpoint, starts fresh only if there is none") {
    fixture f;
    f.environment.insert(
        {{"WANDB_ENTITY", f.run.entity}, {"WANDB_PROJECT", f.run.project}, {"WANDB_RUN_ID", f.run.id}});
    outcome result = f.start("resume_training", {});
    CHECK(result.status == 0);
    CHECK(result.out == "no checkpoint yet: starting fresh\nepoch 1, loss 4\nepoch 2, loss 2\n");

    f.server.add_fault(stand_in::place::graphql, stand_in::act::status(403));
    result = f.start("resume_training", {});
    CHECK(result.status == 1);
    CHECK(result.out == "");
    CHECK(contains(result.err, "not starting: "));
    f.server.clear_faults();

    f.server.add_file(f.run, "checkpoint.txt", "7 0.5\n");
    const std::string key = std::exchange(f.environment["WANDB_API_KEY"], "");
    result = f.start("resume_training", {});  // without a key the service hides the run
    CHECK(result.status == 1);
    CHECK(result.out == "");
    CHECK(contains(result.err, "not starting: "));
    CHECK(contains(result.err, "no API key"));
    f.environment["WANDB_API_KEY"] = key;
    result = f.start("resume_training", {});
    CHECK(result.status == 0);
    CHECK(result.out == "resuming after epoch 7, loss 0.5\nepoch 8, loss 0.25\nepoch 9, loss 0.125\n");
  }

  TEST_CASE("training_loop: killed, and continued from the newest checkpoint in another directory") {
    fixture f;
    f.environment.insert(
        {{"WANDB_ENTITY", f.run.entity}, {"WANDB_PROJECT", f.run.project}, {"WANDB_RUN_ID", f.run.id}});
    {
      pipe_ends out = make_pipe();
      setup how = f.how();
      how.standard_output = out.write.get();
      child running(example("training_loop"), {"1000000000"}, how);
      out.write.close();  // so that reading ends if the program does
      std::string printed;
      char bytes[256];
      while (printed.find("epoch 3") == std::string::npos) {
        const auto count = ::read(out.read.get(), bytes, sizeof bytes);
        REQUIRE(count > 0);
        printed.append(bytes, static_cast<std::size_t>(count));
      }
      running.signal(SIGKILL);
    }
    // What the program that uploads would have uploaded so far: not in the order of the names.
    for (const int epoch : {9, 10, 2}) {
      stand_in::file_attributes attributes;
      attributes.updated_at = "2024-01-02T03:04:" + std::to_string(10 + epoch) + "Z";
      f.server.add_file(f.run, "checkpoints/epoch-" + std::to_string(epoch) + ".txt",
                        std::to_string(epoch) + " 0.5\n", attributes);
    }
    fs::remove_all(f.work() / "checkpoints");
    const outcome result = f.start("training_loop", {"12"});
    CHECK(result.status == 0);
    CHECK(result.out ==
          "continuing from checkpoints/epoch-10.txt\nepoch 11, weight 0.25\nepoch 12, weight 0.125\n");
    CHECK(read_file(f.work() / "checkpoints/epoch-12.txt") == "12 0.125\n");
    f.server.add_fault(stand_in::place::graphql, stand_in::act::status(403));
    CHECK(f.start("training_loop", {"12"}).status == 1);
    f.server.clear_faults();
    f.environment.erase("WANDB_API_KEY");  // without a key the service hides the run
    const outcome hidden = f.start("training_loop", {"12"});
    CHECK(hidden.status == 1);
    CHECK(hidden.out == "");
  }

  TEST_CASE("progress_and_cancel: stops in time, and a second call resumes") {
    fixture f;
    const auto content = stand_in::generated(3'000'000);
    f.server.add_file(f.run, "model.h5", content);
    f.server.add_fault(stand_in::target(stand_in::place::storage), stand_in::act::stall(1'000'000));
    outcome result = f.start("progress_and_cancel", {"model.h5", f.run_path(), "4"});
    CHECK(result.status == 130);
    CHECK(contains(result.out, "stopped after "));
    CHECK_FALSE(fs::exists(f.work() / "model.h5"));

    f.server.clear_faults();
    f.server.clear_log();
    result = f.start("progress_and_cancel", {"model.h5", f.run_path()});
    CHECK(result.status == 0);
    CHECK(contains(result.out, "is here: 3000000 bytes\n"));
    CHECK(read_file(f.work() / "model.h5") == stand_in::read_text(*content));
    CHECK(f.server.counted().of(stand_in::request_kind::storage).body_bytes < 3'000'000);
  }

  TEST_CASE("cache_policy: young copies are kept, old ones compared, the user's files kept") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "first");
    const auto restore = [&](const char* max_age) {
      return f.start("cache_policy", {"a.txt", f.run_path(), max_age});
    };
    CHECK(contains(restore("3600").out, "a.txt: 5 bytes\n"));

    f.server.add_file(f.run, "a.txt", "second");
    f.server.clear_log();
    CHECK(contains(restore("3600").out, "a young copy of vanpelt/my-project/a1b2c3d: kept\n"));
    CHECK(f.requests() == 0);
    CHECK(contains(restore("0").out, "downloaded\n"));
    CHECK(read_file(f.work() / "a.txt") == "second");
    CHECK(contains(restore("0").out, "an old copy, still the same: kept\n"));

    write_file(f.work() / "a.txt", "edited by hand");
    CHECK(contains(restore("0").out, "our own file: kept\n"));
    CHECK(read_file(f.work() / "a.txt") == "edited by hand");
  }

  // The files in tests/data were written by the safetensors, numpy and zipfile modules of Python: see make.py there.
  TEST_CASE("safetensors_tensor: lists the tensors of a real file, and reads one") {
    fixture f;
    const std::string real = read_file(fs::path(__FILE__).parent_path() / "data" / "weights.safetensors");
    REQUIRE(real.size() > 16384);
    f.server.add_file(f.run, "weights.safetensors", real);
    outcome result = f.start("safetensors_tensor", {"weights.safetensors", f.run_path()});
    CHECK(result.status == 0);
    CHECK(result.err == "");
    CHECK(result.out == "step I64 []\nembedding F32 [64,64]\nlayer1.weight F32 [2,3]\nlayer1.bias F16 [3]\n");
    result = f.start("safetensors_tensor", {"weights.safetensors", f.run_path(), "layer1.weight"});
    CHECK(result.out == "layer1.weight: 24 of 16734 bytes: 0 0.25 0.5 0.75 1 1.25\n");
    result = f.start("safetensors_tensor", {"weights.safetensors", f.run_path(), "embedding"});
    CHECK(contains(result.out, "embedding: 16384 of 16734 bytes: -1 -0.9995"));
    CHECK(fs::is_empty(f.work()));

    CHECK(f.start("safetensors_tensor", {"weights.safetensors", f.run_path(), "none"}).status == 1);
    f.server.add_file(f.run, "wrong.safetensors", std::string(100, '\xff'));
    CHECK(contains(f.start("safetensors_tensor", {"wrong.safetensors", f.run_path()}).err,
                   "not a safetensors file"));
    f.server.add_file(f.run, "short.safetensors", "1234");
    CHECK(f.start("safetensors_tensor", {"short.safetensors", f.run_path()}).status == 1);
  }

  TEST_CASE("zip_directory: lists real archives, and reads stored entries") {
    fixture f;
    for (const char* name : {"arrays.npz", "mixed.zip"})
      f.server.add_file(f.run, name, read_file(fs::path(__FILE__).parent_path() / "data" / name));
    outcome result = f.start("zip_directory", {"arrays.npz", f.run_path()});
    CHECK(result.status == 0);
    CHECK(result.err == "");
    CHECK(result.out == "168 stored x.npy\n200 stored y.npy\n136 stored names.npy\n");
    result = f.start("zip_directory", {"arrays.npz", f.run_path(), "x.npy"});
    CHECK(result.out.size() == 168);
    CHECK(result.out.compare(0, 6, "\x93NUMPY") == 0);
    CHECK(result.out.substr(128) == std::string("\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0"
                                                "\3\0\0\0\0\0\0\0\4\0\0\0\0\0\0\0",
                                                40));
    result = f.start("zip_directory", {"mixed.zip", f.run_path()});
    CHECK(result.out == "14 stored config.json\n0 stored logs/\n4500 8 logs/train.txt\n");
    CHECK(f.start("zip_directory", {"mixed.zip", f.run_path(), "config.json"}).out == "{\"epochs\": 3}\n");
    CHECK(
        contains(f.start("zip_directory", {"mixed.zip", f.run_path(), "logs/train.txt"}).err, "compressed"));
    CHECK(fs::is_empty(f.work()));

    f.server.add_file(f.run, "text.zip", "no archive");
    CHECK(contains(f.start("zip_directory", {"text.zip", f.run_path()}).err, "not a zip archive"));
  }

  TEST_CASE("memory_transport: works without a network") {
    fixture f;
    const outcome result = f.start("memory_transport", {});
    CHECK(result.status == 0);
    CHECK(result.err == "");
    CHECK(contains(result.out, "ok: "));
    CHECK_FALSE(contains(result.out, "FAILED"));
    CHECK(f.requests() == 0);
  }

  TEST_CASE("no_exceptions") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "twelve bytes");
    outcome result = f.start("no_exceptions", {"a.txt", f.run_path()});
    CHECK(result.status == 0);
    CHECK(contains(result.out, "a.txt: 12 bytes\n"));
    result = f.start("no_exceptions", {"b.txt", f.run_path()});
    CHECK(result.status == 1);
    CHECK(contains(result.err, "(file_not_found, HTTP status 0)"));
  }

  TEST_CASE("hdf5_weights: a file of h5py, read with the HDF5 library") {
#ifdef WANDB_RESTORE_TESTS_NO_HDF5  // defined by a build without the example
    MESSAGE("left out: the example was not built, because HDF5 was not found");
    return;
#endif
    fixture f;
    for (const char* name : {"weights.h5", "arrays.npz"})
      f.server.add_file(f.run, name, read_file(fs::path(__FILE__).parent_path() / "data" / name));
    outcome result = f.start("hdf5_weights", {"weights.h5", f.run_path()});
    CHECK(result.status == 0);
    CHECK(result.err == "");
    CHECK(result.out == "conv/kernel [8,64]: -1 -0.996086 -0.992172 ...\n"
                        "dense/bias [3]: -1.5 0.25 3\n"
                        "dense/kernel [2,3]: 0 0.25 0.5 ...\n");
    result = f.start("hdf5_weights", {"arrays.npz", f.run_path()});
    CHECK(result.status == 1);
    CHECK(contains(result.err, "arrays.npz is not an HDF5 file"));
  }

  TEST_CASE("libcurl_transport") {
#ifdef WANDB_RESTORE_TESTS_NO_LIBCURL  // defined by a build without the example
    MESSAGE("left out: the example was not built, because libcurl was not found");
    return;
#endif
    stand_in::options options;
    options.proxy = true;
    options.proxy_credentials = "user:secret";
    fixture f(options);
    const auto content = stand_in::generated(40'000'000);
    f.server.add_file(f.run, "small.txt", "twelve bytes");
    f.server.add_file(f.run, "large.h5", content);

    SUBCASE("requests reuse their connection") {
      const outcome result = f.start("libcurl_transport", {"small.txt", f.run_path()});
      CHECK(result.status == 0);
      CHECK(contains(result.out, "small.txt: 12 bytes over libcurl, verified\n"));
      CHECK(f.server.counted().of(stand_in::request_kind::graphql).requests == 1);
      CHECK(f.server.counted().of(stand_in::request_kind::files).requests == 1);
      CHECK(f.server.counted().of(stand_in::request_kind::storage).requests == 1);
      CHECK(f.server.counted().of(stand_in::origin::service).handshakes == 1);
      CHECK(f.server.counted().of(stand_in::origin::storage).handshakes == 1);
    }
    SUBCASE("a large file, with cut and reset connections") {
      f.server.add_fault(stand_in::target(stand_in::place::storage).nth(1), stand_in::act::cut(5'000'000));
      f.server.add_fault(stand_in::target(stand_in::place::storage).nth(2), stand_in::act::reset(1'000'000));
      const outcome result = f.start("libcurl_transport", {"large.h5", f.run_path()});
      CHECK(result.status == 0);
      CHECK(result.err == "");
      CHECK(contains(result.out, "large.h5: 40000000 bytes over libcurl, verified\n"));
      CHECK(read_file(f.work() / "large.h5") == stand_in::read_text(*content));
    }
    SUBCASE("through a proxy that wants a password") {
      std::string proxy = f.server.proxy_url();
      proxy.insert(proxy.find("//") + 2, "user:secret@");
      f.environment["WANDB_HTTPS_PROXY"] = proxy;
      const outcome result = f.start("libcurl_transport", {"small.txt", f.run_path()});
      CHECK(result.status == 0);
      CHECK(f.server.counted().of(stand_in::request_kind::proxy).requests >= 2);
    }
    SUBCASE("a certificate of an unknown authority") {
      stand_in::server().write_ca(f.directory.path() / "ca.pem");  // the certificate of another authority
      const outcome result = f.start("libcurl_transport", {"small.txt", f.run_path()});
      CHECK(result.status == 1);
      CHECK(contains(result.err, "ertificate"));
      CHECK(f.requests() == 0);
    }
    SUBCASE("an answer that is not HTTP") {
      f.server.add_fault(stand_in::place::graphql, stand_in::act::garbage_status_line());
      CHECK(f.start("libcurl_transport", {"small.txt", f.run_path()}).status == 1);
    }
    SUBCASE("a header without end") {
      f.server.add_fault(stand_in::place::graphql, stand_in::act::endless_header());
      CHECK(f.start("libcurl_transport", {"small.txt", f.run_path()}).status == 1);
    }
  }
}
#endif  // _WIN32
