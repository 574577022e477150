/* One request on its way. Its owners are the caller and, until it has ended, the library; whoever
 * lets go of it last frees it. Waiting and polling need no Python. */
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "door.h"

/* The start of it, and its deleter, are of DLPack's ABI; a tensor itself is of no interest here. */
struct DLManagedTensor {
  struct {
    void *data;
    struct {
      int32_t type, id;
    } device;
    int32_t ndim;
    struct {
      uint8_t code, bits;
      uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
  } tensor;
  void *manager;
  void (*deleter)(struct DLManagedTensor *self);
};

struct sd_job {
  pthread_mutex_t lock; /* for all below but what never changes */
  pthread_cond_t ended;
  int owners;
  int state;
  bool freed; /* by the caller: no callbacks, and hands off its pixels */
  sd_progress progress;
  sd_status *error;
  sd_result result;
  uint8_t *caller_pixels, *own_pixels, *flags;
  float *latents;
  sd_file *files;
  uint8_t *file_data;
  char *json;
  struct DLManagedTensor *device_pixels;
  /* These never change. */
  void *user_data, *job_data;
  sd_progress_callback on_progress;
  sd_preview_callback on_preview;
};

sd_job *job_new(const sd_context *context, const sd_request *request) {
  sd_job *job = calloc(1, sizeof *job);
  if (job == NULL) return NULL;
  pthread_condattr_t attributes;
  pthread_condattr_init(&attributes);
  pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
  pthread_cond_init(&job->ended, &attributes);
  pthread_condattr_destroy(&attributes);
  pthread_mutex_init(&job->lock, NULL);
  job->owners = 2;
  job->progress.struct_size = sizeof job->progress;
  job->caller_pixels = request->pixels;
  job->user_data = context->user_data;
  job->job_data = request->job_data;
  job->on_progress = context->on_progress;
  job->on_preview = context->on_preview;
  return job;
}

void job_discard(sd_job *job) {
  sd_status_free(job->error);
  free(job->own_pixels);
  free(job->flags);
  free(job->latents);
  free(job->files);
  free(job->file_data);
  free(job->json);
  if (job->device_pixels != NULL) job->device_pixels->deleter(job->device_pixels);
  pthread_cond_destroy(&job->ended);
  pthread_mutex_destroy(&job->lock);
  free(job);
}

/* Unlocks it for good. */
static void let_go(sd_job *job) {
  int left = --job->owners;
  pthread_mutex_unlock(&job->lock);
  if (left == 0) job_discard(job);
}

void job_report(sd_job *job, uint32_t step, uint32_t num_steps) {
  pthread_mutex_lock(&job->lock);
  job->state = SD_JOB_RUNNING;
  job->progress.step = step;
  job->progress.num_steps = num_steps;
  sd_progress progress = job->progress;
  bool wanted = job->on_progress != NULL && !job->freed;
  pthread_mutex_unlock(&job->lock);
  if (wanted) job->on_progress(job->user_data, job->job_data, job, &progress);
}

void job_preview(sd_job *job, uint32_t first_image, uint32_t num_images, uint32_t height,
                 uint32_t width, const uint8_t *pixels) {
  pthread_mutex_lock(&job->lock);
  bool wanted = job->on_preview != NULL && !job->freed;
  pthread_mutex_unlock(&job->lock);
  sd_preview preview = {sizeof preview, first_image, num_images, height, width, pixels};
  if (wanted) job->on_preview(job->user_data, job->job_data, job, &preview);
}

static void *copy_of(const void *data, size_t bytes) {
  void *copy = malloc(bytes);
  if (copy != NULL) memcpy(copy, data, bytes);
  return copy;
}

static bool copy_files(sd_job *job, const sd_result *from) {
  size_t bytes = 0;
  for (uint32_t i = 0; i < from->num_images; i++) bytes += from->files[i].bytes;
  job->files = calloc(from->num_images, sizeof *job->files);
  job->file_data = malloc(bytes);
  if (job->files == NULL || job->file_data == NULL) return false;
  uint8_t *next = job->file_data;
  for (uint32_t i = 0; i < from->num_images; i++) {
    memcpy(next, from->files[i].data, from->files[i].bytes);
    job->files[i] = (sd_file){next, from->files[i].bytes};
    next += from->files[i].bytes;
  }
  return true;
}

static bool copy_result(sd_job *job, const sd_result *from) {
  size_t n = from->num_images;
  size_t pixels_bytes = n * from->height * from->width * 3;
  size_t latents = n * from->latent_channels * from->latent_height * from->latent_width;
  if (job->caller_pixels != NULL)
    memcpy(job->caller_pixels, from->pixels, pixels_bytes);
  else if ((job->own_pixels = copy_of(from->pixels, pixels_bytes)) == NULL)
    return false;
  if ((job->latents = copy_of(from->latents, latents * sizeof(float))) == NULL) return false;
  if ((job->json = strdup(from->json)) == NULL) return false;
  if (from->nsfw_content_detected != NULL &&
      (job->flags = copy_of(from->nsfw_content_detected, n)) == NULL)
    return false;
  if (from->files != NULL && !copy_files(job, from)) return false;
  job->result = *from;
  job->result.pixels = job->caller_pixels != NULL ? job->caller_pixels : job->own_pixels;
  job->result.latents = job->latents;
  job->result.nsfw_content_detected = job->flags;
  job->result.files = job->files;
  job->result.json = job->json;
  return true;
}

static void end(sd_job *job, int state) {
  job->state = state;
  pthread_cond_broadcast(&job->ended);
  let_go(job);
}

void job_succeed(sd_job *job, const sd_result *result, struct DLManagedTensor *device_pixels) {
  pthread_mutex_lock(&job->lock);
  job->device_pixels = device_pixels;
  if (job->freed || copy_result(job, result)) {
    job->progress.step = job->progress.num_steps;
    end(job, SD_JOB_SUCCEEDED);
  } else {
    job->error = status_out_of_memory();
    end(job, SD_JOB_FAILED);
  }
}

void job_fail(sd_job *job, sd_status *status) {
  pthread_mutex_lock(&job->lock);
  job->error = status;
  end(job, sd_status_code(status) == SD_ERROR_CANCELLED ? SD_JOB_CANCELLED : SD_JOB_FAILED);
}

int sd_job_poll(sd_job *job, sd_progress *progress) {
  if (job == NULL) return SD_JOB_FAILED;
  pthread_mutex_lock(&job->lock);
  int state = job->state;
  sd_progress now = job->progress;
  pthread_mutex_unlock(&job->lock);
  if (progress != NULL && progress->struct_size >= sizeof now) {
    progress->step = now.step;
    progress->num_steps = now.num_steps;
  }
  return state;
}

static void unlock(void *lock) { pthread_mutex_unlock(lock); }

int sd_job_wait(sd_job *job, int64_t timeout_ms) {
  if (job == NULL) return SD_JOB_FAILED;
  struct timespec until;
  clock_gettime(CLOCK_MONOTONIC, &until);
  int64_t limit_ms = (int64_t)1 << 40; /* 34 years: adding it does not overflow */
  int64_t wait_ms = timeout_ms < limit_ms ? timeout_ms : limit_ms;
  if (timeout_ms >= 0) {
    int64_t ns = until.tv_nsec + wait_ms % 1000 * 1000000;
    until.tv_sec += wait_ms / 1000 + ns / 1000000000;
    until.tv_nsec = ns % 1000000000;
  }
  int late = 0, state;
  pthread_mutex_lock(&job->lock);
  pthread_cleanup_push(unlock, &job->lock); /* where this thread is cancelled meanwhile */
  while (job->state < SD_JOB_SUCCEEDED && late == 0) {
    if (timeout_ms < 0)
      pthread_cond_wait(&job->ended, &job->lock);
    else
      late = pthread_cond_timedwait(&job->ended, &job->lock, &until);
  }
  state = job->state;
  pthread_cleanup_pop(1);
  return state;
}

sd_status *sd_job_cancel(sd_job *job) {
  if (job == NULL) return status_wrong("job is NULL", "Submit one first.");
  if (sd_job_poll(job, NULL) >= SD_JOB_SUCCEEDED) return NULL;
  return door_cancel(job);
}

/* Why a job has nothing to give, while it is locked; NULL where it has. */
static sd_status *why_nothing(const sd_job *job) {
  if (job->state < SD_JOB_SUCCEEDED)
    return status_new(SD_ERROR_NOT_ENDED, "the job has not ended", "Wait for it first.");
  if (job->error != NULL)
    return status_new(sd_status_code(job->error), sd_status_message(job->error),
                      sd_status_hint(job->error));
  return NULL;
}

sd_status *sd_job_result(sd_job *job, sd_result *result) {
  if (job == NULL) return status_wrong("job is NULL", "Submit one first.");
  if (result == NULL || result->struct_size < sizeof *result)
    return status_wrong("result is NULL or has no struct_size",
                        "Set result.struct_size = sizeof result.");
  pthread_mutex_lock(&job->lock);
  sd_status *error = why_nothing(job);
  if (error == NULL) {
    size_t struct_size = result->struct_size;
    *result = job->result;
    result->struct_size = struct_size;
  }
  pthread_mutex_unlock(&job->lock);
  return error;
}

sd_status *sd_job_device_pixels(sd_job *job, struct DLManagedTensor **tensor) {
  if (job == NULL) return status_wrong("job is NULL", "Submit one first.");
  if (tensor == NULL) return status_wrong("tensor is NULL", "Say where the tensor is to go.");
  *tensor = NULL;
  pthread_mutex_lock(&job->lock);
  sd_status *error = why_nothing(job);
  if (error == NULL && job->device_pixels == NULL)
    error = status_wrong("the job has no pictures on the device",
                         "Set sd_request.device_pixels, and take them once.");
  if (error == NULL) {
    *tensor = job->device_pixels;
    job->device_pixels = NULL;
  }
  pthread_mutex_unlock(&job->lock);
  return error;
}

void sd_job_free(sd_job *job) {
  if (job == NULL) return;
  pthread_mutex_lock(&job->lock);
  job->freed = true;
  bool has_ended = job->state >= SD_JOB_SUCCEEDED;
  pthread_mutex_unlock(&job->lock);
  if (!has_ended) sd_status_free(door_cancel(job));
  pthread_mutex_lock(&job->lock);
  let_go(job);
}
