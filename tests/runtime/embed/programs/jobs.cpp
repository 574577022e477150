// Jobs under way, by the C++ wrapper: callbacks, cancelling, a full queue. jobs BUNDLE PNG LORA
// writes one picture's file, with two LoRAs, and prints only what went wrong.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <semaphore>
#include <thread>
#include <type_traits>
#include <vector>

#include "sd_runtime.hpp"

#include "dlpack.h"

#define CHECK(condition)                                               \
  do {                                                                 \
    if (!(condition)) {                                                \
      std::fprintf(stderr, "line %d: not %s\n", __LINE__, #condition); \
      std::exit(1);                                                    \
    }                                                                  \
  } while (0)

static_assert(!std::is_copy_constructible_v<sd::Context> && !std::is_copy_constructible_v<sd::Job>);
static_assert(std::is_nothrow_move_constructible_v<sd::Context>);
static_assert(std::is_nothrow_move_assignable_v<sd::Job>);
// Frozen with SD_ABI_VERSION 1, on 64 bits.
static_assert(sizeof(sd_open_params) == 80 && sizeof(sd_request) == 112);
static_assert(offsetof(sd_open_params, loras) == 56);  // what they began with
static_assert(offsetof(sd_request, device_pixels) == 104);
static_assert(sizeof(sd_result) == 72 && sizeof(sd_progress) == 16 && sizeof(sd_preview) == 32);

namespace {

template <typename Call>
sd::Code code_of(Call&& call) {
  try {
    call();
  } catch (const sd::Error& error) {
    CHECK(!error.hint().empty());
    return error.code();
  }
  return static_cast<sd::Code>(SD_OK);
}

void draw(const char* bundle, const char* png, const std::string& lora) {
  std::vector<std::uint32_t> steps, previews;
  std::thread::id caller = std::this_thread::get_id(), drawer;
  sd::Context first({.bundle = bundle,
                     .backend = "onnxruntime",
                     .threads = 1,
                     .on_progress =
                         [&](sd_job*, const sd::Progress& progress) {
                           CHECK(progress.num_steps == 4);
                           steps.push_back(progress.step);
                           drawer = std::this_thread::get_id();
                         },
                     .on_preview =
                         [&](sd_job*, const sd::Preview& preview) {
                           CHECK(preview.num_images == 2 && preview.first_image == 0);
                           CHECK(preview.pixels.size() == 2 * 64 * 64 * 3);
                           CHECK(drawer == std::this_thread::get_id());
                           previews.push_back(steps.back());
                         },
                     .loras = {lora, lora + "=-0.5"}});
  const sd::Context context = std::move(first);
  sd::Job job = context.submit({.prompt = "a cat",
                                .negative_prompt = "a dog",
                                .scheduler = "ddim",
                                .seed = ~std::uint64_t{0} - 1,
                                .guidance_scale = 3.5,
                                .num_inference_steps = 4,
                                .num_images_per_prompt = 2,
                                .format = "png",
                                .previews = 1});
  const sd::Result result = job.result();
  CHECK(job.state() == sd::State::succeeded && job.progress().step == 4);
  CHECK(result.num_images() == 2 && result.image(1).size() == 64 * 64 * 3);
  CHECK(result.latents(1).size() == 4 * 8 * 8 && !result.nsfw_content_detected(0));
  CHECK((steps == std::vector<std::uint32_t>{1, 2, 3, 4}));
  CHECK((previews == std::vector<std::uint32_t>{2}));
  CHECK(drawer != caller && drawer != std::thread::id());
  const auto file = result.file(1);
  std::ofstream(png, std::ios::binary)
      .write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
  CHECK(code_of([&] { context.submit({.prompt = "a cat", .scheduler = "etch"}); }) ==
        sd::Code::config);
}

void share(const char* bundle) {
  const sd::Context context({.bundle = bundle, .backend = "onnxruntime", .threads = 1});
  sd::Request request{.prompt = "a cat", .num_inference_steps = 1, .num_images_per_prompt = 2};
  const sd::Job without = context.submit(request);
  CHECK(code_of([&] { without.device_pixels(); }) == sd::Code::config);
  request.device_pixels = true;
  { const sd::Job nobody_takes_them = context.submit(request); nobody_takes_them.wait(); }
  auto job = std::make_unique<sd::Job>(context.submit(request));
  DLManagedTensor* tensor = job->device_pixels();
  CHECK(code_of([&] { job->device_pixels(); }) == sd::Code::config);
  const DLTensor& pixels = tensor->dl_tensor;
  CHECK(pixels.device.device_type == kDLCPU && pixels.ndim == 4);
  CHECK(pixels.dtype.code == kDLUInt && pixels.dtype.bits == 8 && pixels.dtype.lanes == 1);
  const auto expected = std::to_array<std::int64_t>({2, 64, 64, 3});
  CHECK(std::equal(expected.begin(), expected.end(), pixels.shape));
  const auto* data = static_cast<const std::uint8_t*>(pixels.data) + pixels.byte_offset;
  const auto image = job->result().image(1);
  const std::vector<std::uint8_t> drawn(image.begin(), image.end());
  job.reset();
  CHECK(std::equal(drawn.begin(), drawn.end(), data + drawn.size()));
  tensor->deleter(tensor);
}

void stop(const char* bundle) {
  std::binary_semaphore reached(0), go_on(0);
  sd_job* to_throw_in = nullptr;
  std::atomic<bool> slowly = false;
  const sd::Request request{.prompt = "a cat", .scheduler = "ddim", .num_inference_steps = 500};
  std::vector<std::uint8_t> pixels(64 * 64 * 3, 1);
  sd::Context context({.bundle = bundle,
                       .backend = "onnxruntime",
                       .threads = 1,
                       .queue_size = 2,
                       .on_progress = [&](sd_job* job, const sd::Progress& progress) {
                         if (job == to_throw_in) throw 1;
                         if (slowly) std::this_thread::sleep_for(std::chrono::milliseconds(20));
                         if (progress.step != 1) return;
                         reached.release();
                         go_on.acquire();
                       }});
  sd::Job running = context.submit(request);
  reached.acquire();
  CHECK(running.state() == sd::State::running && running.progress().num_steps == 500);
  CHECK(running.wait_for(std::chrono::milliseconds(1)) == sd::State::running);
  sd::Job waiting = context.submit(request);
  auto abandoned = std::make_unique<sd::Job>(
      context.submit({.prompt = "a cat", .num_inference_steps = 1, .pixels = pixels}));
  CHECK(code_of([&] { context.submit(request); }) == sd::Code::busy);
  CHECK(waiting.state() == sd::State::waiting);
  waiting.cancel();  // at once, although nothing moves
  CHECK(waiting.state() == sd::State::cancelled);
  CHECK(code_of([&] { waiting.result(); }) == sd::Code::cancelled);
  abandoned.reset();
  std::fill(pixels.begin(), pixels.end(), std::uint8_t{2});
  running.cancel();
  go_on.release();
  CHECK(running.wait() == sd::State::cancelled);  // one of 500 steps was done
  CHECK(running.progress().step == 1);

  sd::Job next = context.submit(request);
  reached.acquire();
  to_throw_in = next.get();
  go_on.release();
  CHECK(next.wait() == sd::State::cancelled && next.progress().step <= 3);
  for (const auto value : pixels) CHECK(value == 2);  // nobody drew into them

  to_throw_in = nullptr;
  sd::Job last = context.submit(request);
  reached.acquire();
  slowly = true;
  std::jthread closer([&] { const sd::Context closing = std::move(context); });
  go_on.release();
  CHECK(last.wait() == sd::State::cancelled);
}

// A context takes the place of one that draws.
void renew(const char* bundle) {
  std::counting_semaphore<2> reached(0);
  const std::vector<int> own{1, 2, 3};
  const sd::OpenParams open{.bundle = bundle,
                            .backend = "onnxruntime",
                            .threads = 1,
                            .on_progress = [&reached, own](sd_job*, const sd::Progress& progress) {
                              if (progress.step == 1) reached.release();
                              std::this_thread::sleep_for(std::chrono::milliseconds(50));
                              CHECK(own.back() == 3);  // a part of the first one's parameters
                            }};
  sd::Context context(open);
  const sd::Job job =
      context.submit({.prompt = "a cat", .scheduler = "ddim", .num_inference_steps = 500});
  reached.acquire();
  context = sd::Context(open);
  CHECK(job.wait() == sd::State::cancelled);
  CHECK(context.submit({.prompt = "a cat", .num_inference_steps = 2}).wait() ==
        sd::State::succeeded);
}

// Eight threads ask at once; what a seed gives depends on nobody else.
void crowd(const char* bundle) {
  constexpr std::uint64_t num_seeds = 3;
  const sd::Context context(
      {.bundle = bundle, .backend = "onnxruntime", .threads = 1, .queue_size = 64});
  const auto draw_one = [&](std::uint64_t seed) {
    const sd::Job job =
        context.submit({.prompt = "a cat", .seed = seed, .num_inference_steps = 1});
    const auto pixels = job.result().image(0);
    return std::vector<std::uint8_t>(pixels.begin(), pixels.end());
  };
  std::vector<std::vector<std::uint8_t>> alone;
  for (std::uint64_t seed = 0; seed < num_seeds; seed++) alone.push_back(draw_one(seed));
  std::vector<std::jthread> threads;
  for (std::uint64_t i = 0; i < 8; i++)
    threads.emplace_back([&, i] {
      for (std::uint64_t seed = i; seed < i + 4; seed++)
        CHECK(draw_one(seed % num_seeds) == alone[seed % num_seeds]);
    });
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 4);
  draw(argv[1], argv[2], argv[3]);
  share(argv[1]);
  stop(argv[1]);
  renew(argv[1]);
  crowd(argv[1]);
}
