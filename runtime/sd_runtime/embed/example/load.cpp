// Threads that ask without pause, through cycles of opening and closing the bundle:
// load BUNDLE THREADS CALLS CYCLES. Every picture of a seed must be the same to the byte; some
// jobs are cancelled, some let go of, some wrong. Prints figures as JSON; exits 1 at any error.
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "sd_runtime.hpp"

namespace {

using Clock = std::chrono::steady_clock;
constexpr std::uint64_t num_seeds = 4;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// Of the process, and of what malloc has given out and not taken back.
struct Memory {
  double resident_mb, allocated_mb;
};

Memory memory() {
  const auto heap = mallinfo2();
  long total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return {static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1e6,
          static_cast<double>(heap.uordblks + heap.hblkhd) / 1e6};
}

// What has been drawn of each seed, and what went wrong.
class Ledger {
 public:
  void compare(std::uint64_t seed, std::span<const std::uint8_t> pixels) {
    const std::lock_guard guard(lock_);
    auto& first = drawn_[seed];
    if (first.empty()) first.assign(pixels.begin(), pixels.end());
    if (!std::equal(first.begin(), first.end(), pixels.begin(), pixels.end())) errors++;
  }
  std::atomic<int> pictures = 0, cancelled = 0, refused = 0, errors = 0, progress = 0;

 private:
  std::mutex lock_;
  std::vector<std::uint8_t> drawn_[num_seeds];
};

void ask(const sd::Context& context, int number, Ledger& ledger) {
  const std::uint64_t seed = static_cast<std::uint64_t>(number) % num_seeds;
  sd::Request request{.prompt = "a cat", .seed = seed, .num_inference_steps = 2};
  if (number % 50 == 49) request.scheduler = "no such scheduler";
  try {
    const sd::Job job = context.submit(request);
    if (number % 50 == 9) return;  // let go of while it runs
    if (number % 50 == 19) job.cancel();
    const sd::Result result = job.result();
    ledger.compare(seed, result.image(0));
    ledger.pictures++;
  } catch (const sd::Error& error) {
    if (error.code() == sd::Code::config && number % 50 == 49)
      ledger.refused++;
    else if (error.code() == sd::Code::cancelled && number % 50 == 19)
      ledger.cancelled++;
    else {
      ledger.errors++;
      std::fprintf(stderr, "%s\n%s\n", error.what(), error.hint().c_str());
    }
  }
}

void cycle(const char* bundle, int threads, std::atomic<int>& next, int last, Ledger& ledger) {
  const sd::Context context({.bundle = bundle,
                             .threads = 1,
                             .queue_size = 64,
                             .on_progress = [&ledger](sd_job*, const sd::Progress&) {
                               ledger.progress++;
                             }});
  std::vector<std::jthread> workers;
  for (int i = 0; i < threads; i++)
    workers.emplace_back([&] {
      for (int number = next++; number < last; number = next++) ask(context, number, ledger);
    });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "load BUNDLE THREADS CALLS CYCLES\n");
    return 2;
  }
  const int threads = std::atoi(argv[2]), calls = std::atoi(argv[3]), cycles = std::atoi(argv[4]);
  Ledger ledger;
  double first_open_ms = 0, poll_us = 0, submit_us = 0;
  std::vector<Memory> memories;
  const auto start = Clock::now();
  try {
    {
      const sd::Context context({.bundle = argv[1], .threads = 1});
      first_open_ms = ms_since(start);
      const sd::Job job = context.submit({.prompt = "a cat", .num_inference_steps = 1});
      job.wait();
      constexpr int polls = 100000, submits = 10;
      auto begin = Clock::now();
      for (int i = 0; i < polls; i++) (void)job.state();
      poll_us = 1e3 * ms_since(begin) / polls;
      std::vector<sd::Job> jobs;
      begin = Clock::now();
      for (int i = 0; i < submits; i++)
        jobs.push_back(context.submit({.prompt = "a cat", .num_inference_steps = 1}));
      submit_us = 1e3 * ms_since(begin) / submits;
    }
    for (int i = 0; i < cycles; i++) {
      const int last = calls * (i + 1) / cycles;
      std::atomic<int> next = calls * i / cycles;
      cycle(argv[1], threads, next, last, ledger);
      memories.push_back(memory());
    }
  } catch (const sd::Error& error) {
    std::fprintf(stderr, "%s\n%s\n", error.what(), error.hint().c_str());
    return static_cast<int>(error.code());
  }
  std::printf("{\"threads\": %d, \"calls\": %d, \"cycles\": %d, \"pictures\": %d, "
              "\"cancelled\": %d, \"refused\": %d, \"errors\": %d, \"steps\": %d, "
              "\"first_open_ms\": %.1f, \"poll_us\": %.3f, \"submit_us\": %.1f, "
              "\"seconds\": %.1f, \"memory_mb\": [",
              threads, calls, cycles, ledger.pictures.load(), ledger.cancelled.load(),
              ledger.refused.load(), ledger.errors.load(), ledger.progress.load(), first_open_ms,
              poll_us, submit_us, ms_since(start) / 1e3);
  const std::size_t stride = memories.size() > 10 ? memories.size() / 10 : 1;
  for (std::size_t i = stride - 1; i < memories.size(); i += stride)  // resident, allocated
    std::printf("%s[%.1f, %.2f]", i < stride ? "" : ", ", memories[i].resident_mb,
                memories[i].allocated_mb);
  std::printf("]}\n");
  return ledger.errors.load() == 0 ? 0 : 1;
}
