// sd_runtime.h for C++20: handles that free themselves, exceptions instead of statuses.
//
//     sd::Context context({.bundle = "sd14.bundle"});
//     sd::Job job = context.submit({.prompt = "a red circle", .seed = 7});
//     sd::Result result = job.result();  // waits; result.image(0) is a span of its pixels
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sd_runtime.h"

namespace sd {

enum class Code {
  error = SD_ERROR,
  config = SD_ERROR_CONFIG,
  bundle = SD_ERROR_BUNDLE,
  backend = SD_ERROR_BACKEND,
  cancelled = SD_ERROR_CANCELLED,
  busy = SD_ERROR_BUSY,
  not_ended = SD_ERROR_NOT_ENDED,
};

enum class State {
  waiting = SD_JOB_WAITING,
  running = SD_JOB_RUNNING,
  succeeded = SD_JOB_SUCCEEDED,
  failed = SD_JOB_FAILED,
  cancelled = SD_JOB_CANCELLED,
};

// What failed, and in hint() what mends it.
class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& message, std::string hint)
      : std::runtime_error(message), code_(code), hint_(std::move(hint)) {}
  Code code() const noexcept { return code_; }
  const std::string& hint() const noexcept { return hint_; }

 private:
  Code code_;
  std::string hint_;
};

namespace detail {

inline void check(sd_status* status) {
  if (status == nullptr) return;
  std::unique_ptr<sd_status, decltype(&sd_status_free)> owned(status, sd_status_free);
  throw Error(static_cast<Code>(sd_status_code(status)), sd_status_message(status),
              sd_status_hint(status));
}

struct CloseContext {
  void operator()(sd_context* context) const noexcept {
    sd_status_free(sd_context_close(context));
  }
};

struct FreeJob {
  void operator()(sd_job* job) const noexcept { sd_job_free(job); }
};

inline const char* pointer(const std::string& text) {
  return text.empty() ? nullptr : text.c_str();
}

}  // namespace detail

struct Progress {
  std::uint32_t step;  // steps done so far
  std::uint32_t num_steps;
};

struct Preview {
  std::uint32_t first_image, num_images, height, width;
  std::span<const std::uint8_t> pixels;  // [num_images][height][width][3]
};

// Left out means the bundle's default.
struct Request {
  std::string prompt;
  std::string negative_prompt = {};
  std::string scheduler = {};
  std::optional<std::uint64_t> seed = {};
  std::optional<double> guidance_scale = {};
  std::uint32_t num_inference_steps = 0;
  std::uint32_t num_images_per_prompt = 0;
  std::string options_json = {};           // any other field of sd_runtime.Request
  std::string format = {};                 // "png", "jpeg" or "webp": also encode
  std::uint32_t previews = 0;              // to OpenParams::on_preview
  std::span<std::uint8_t> pixels = {};     // where the pictures are to go; must outlive the Job
  bool device_pixels = false;              // keep them for Job::device_pixels too
};

// A view into its Job: good while that lives.
class Result {
 public:
  explicit Result(const sd_result& result) : result_(result) {}
  std::uint32_t num_images() const noexcept { return result_.num_images; }
  std::uint32_t height() const noexcept { return result_.height; }
  std::uint32_t width() const noexcept { return result_.width; }
  // uint8 [height][width][3]
  std::span<const std::uint8_t> image(std::uint32_t index) const {
    const std::size_t bytes = std::size_t{3} * result_.height * result_.width;
    return {result_.pixels + checked(index) * bytes, bytes};
  }
  // [latent_channels][latent_height][latent_width]
  std::span<const float> latents(std::uint32_t index) const {
    const std::size_t size =
        std::size_t{result_.latent_channels} * result_.latent_height * result_.latent_width;
    return {result_.latents + checked(index) * size, size};
  }
  // The bytes of a file, empty where no format was asked for.
  std::span<const std::uint8_t> file(std::uint32_t index) const {
    if (result_.files == nullptr) return {};
    return {result_.files[checked(index)].data, result_.files[index].bytes};
  }
  // Nothing where the bundle has no safety checker.
  std::optional<bool> nsfw_content_detected(std::uint32_t index) const {
    if (result_.nsfw_content_detected == nullptr) return {};
    return result_.nsfw_content_detected[checked(index)] != 0;
  }
  const char* json() const noexcept { return result_.json; }  // recipes and timings_ms

 private:
  std::size_t checked(std::uint32_t index) const {
    if (index >= result_.num_images) throw std::out_of_range("the result has no such picture");
    return index;
  }
  sd_result result_;
};

// One request on its way. Letting go of it cancels it.
class Job {
 public:
  explicit Job(sd_job* job) : job_(job) {}

  State state() const noexcept { return static_cast<State>(sd_job_poll(job_.get(), nullptr)); }
  Progress progress() const noexcept {
    sd_progress progress{sizeof(sd_progress), 0, 0};
    sd_job_poll(job_.get(), &progress);
    return {progress.step, progress.num_steps};
  }
  State wait() const noexcept { return static_cast<State>(sd_job_wait(job_.get(), -1)); }
  State wait_for(std::chrono::milliseconds timeout) const noexcept {
    return static_cast<State>(sd_job_wait(job_.get(), timeout.count() < 0 ? 0 : timeout.count()));
  }
  void cancel() const { detail::check(sd_job_cancel(job_.get())); }

  // Waits; throws what the job failed with.
  Result result() const& {
    wait();
    sd_result result{};
    result.struct_size = sizeof result;
    detail::check(sd_job_result(job_.get(), &result));
    return Result(result);
  }
  Result result() && = delete;  // it would outlive its job

  // Waits; once, if Request::device_pixels said so. The caller's: call its deleter.
  DLManagedTensor* device_pixels() const {
    wait();
    DLManagedTensor* tensor = nullptr;
    detail::check(sd_job_device_pixels(job_.get(), &tensor));
    return tensor;
  }

  sd_job* get() const noexcept { return job_.get(); }

 private:
  std::unique_ptr<sd_job, detail::FreeJob> job_;
};

// The callbacks run in the thread that draws; one that throws cancels its job.
struct OpenParams {
  std::string bundle;
  std::string backend = {};
  std::uint32_t threads = 0;
  std::uint32_t queue_size = 0;
  std::function<void(sd_job*, const Progress&)> on_progress = {};
  std::function<void(sd_job*, const Preview&)> on_preview = {};
  std::vector<std::string> loras = {};  // each "FILE.safetensors" or "FILE.safetensors=SCALE"
  void* cuda_stream = nullptr;          // a cudaStream_t of the caller's, for the engines' work
  std::string precision = {};           // the UNet's, of a bundle with several
};

// An open bundle. Its end cancels all jobs; their results stay.
class Context {
 public:
  explicit Context(OpenParams params) : params_(std::make_unique<OpenParams>(std::move(params))) {
    if (sd_abi_version() != SD_ABI_VERSION)
      throw Error(Code::config, "libsd_runtime.so is of another ABI than sd_runtime.h",
                  "Build the library and the program from one version.");
    sd_open_params open{};
    open.struct_size = sizeof open;
    open.bundle = params_->bundle.c_str();
    open.backend = detail::pointer(params_->backend);
    open.threads = params_->threads;
    open.queue_size = params_->queue_size;
    open.user_data = params_.get();
    if (params_->on_progress) open.on_progress = progressed;
    if (params_->on_preview) open.on_preview = previewed;
    std::vector<const char*> loras;
    for (const std::string& lora : params_->loras) loras.push_back(lora.c_str());
    loras.push_back(nullptr);
    open.loras = loras.data();
    open.cuda_stream = params_->cuda_stream;
    open.precision = detail::pointer(params_->precision);
    sd_context* context = nullptr;
    detail::check(sd_context_open(&open, &context));
    context_.reset(context);
  }

  Context(Context&&) noexcept = default;
  Context& operator=(Context&& other) noexcept {
    if (this == &other) return *this;
    context_.reset();  // whose callbacks use params_ until it is closed
    params_ = std::move(other.params_);
    context_ = std::move(other.context_);
    return *this;
  }

  // Throws Error with Code::busy where the queue is full, Code::config for a wrong request.
  Job submit(const Request& request) const {
    sd_request asked{};
    asked.struct_size = sizeof asked;
    asked.prompt = request.prompt.c_str();
    asked.negative_prompt = detail::pointer(request.negative_prompt);
    asked.scheduler = detail::pointer(request.scheduler);
    asked.seed = request.seed ? &*request.seed : nullptr;
    asked.guidance_scale = request.guidance_scale ? &*request.guidance_scale : nullptr;
    asked.num_inference_steps = request.num_inference_steps;
    asked.num_images_per_prompt = request.num_images_per_prompt;
    asked.options_json = detail::pointer(request.options_json);
    asked.format = detail::pointer(request.format);
    asked.previews = request.previews;
    asked.pixels = request.pixels.data();
    asked.pixels_bytes = request.pixels.size();
    asked.device_pixels = request.device_pixels ? 1 : 0;
    sd_job* job = nullptr;
    detail::check(sd_job_submit(context_.get(), &asked, &job));
    return Job(job);
  }

  std::string info() const { return text(sd_context_info); }              // JSON
  std::string statistics() const { return text(sd_context_statistics); }  // JSON

 private:
  std::string text(sd_status* (*question)(sd_context*, char**)) const {
    char* json = nullptr;
    detail::check(question(context_.get(), &json));
    std::unique_ptr<char, decltype(&sd_string_free)> owned(json, sd_string_free);
    return json;
  }

  static void progressed(void* params, void*, sd_job* job, const sd_progress* progress) noexcept {
    try {
      const Progress now{progress->step, progress->num_steps};
      static_cast<OpenParams*>(params)->on_progress(job, now);
    } catch (...) {
      sd_status_free(sd_job_cancel(job));
    }
  }

  static void previewed(void* params, void*, sd_job* job, const sd_preview* preview) noexcept {
    try {
      const std::size_t bytes =
          std::size_t{3} * preview->num_images * preview->height * preview->width;
      const Preview now{preview->first_image, preview->num_images, preview->height,
                        preview->width,       {preview->pixels, bytes}};
      static_cast<OpenParams*>(params)->on_preview(job, now);
    } catch (...) {
      sd_status_free(sd_job_cancel(job));
    }
  }

  std::unique_ptr<OpenParams> params_;  // outlives the context: its callbacks are in there
  std::unique_ptr<sd_context, detail::CloseContext> context_;
};

}  // namespace sd
