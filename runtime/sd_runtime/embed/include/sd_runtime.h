/* Pictures from a bundle, for C. The library behind it embeds Python; docs/embedding.md says how.
 *
 * Every function may be called from any thread. Text is UTF-8. A struct begins with struct_size,
 * which the caller sets to sizeof of it; all its other fields may be 0, which means the default.
 * A function that can fail returns NULL for success, or a status that the caller frees.
 * No function prints, raises, ends the process or touches a signal handler.
 */
#ifndef SD_RUNTIME_H
#define SD_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

/* Grows when a program that was compiled before would break; compare it with sd_abi_version(). */
#define SD_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sd_status sd_status;   /* why something failed */
typedef struct sd_context sd_context; /* an open bundle, its engines and the thread that draws */
typedef struct sd_job sd_job;         /* one request on its way */
struct DLManagedTensor;               /* of DLPack, with which frameworks share arrays */

enum {
  SD_OK = 0,
  SD_ERROR = 1,           /* none of the others: a defect, or no Python to be found */
  SD_ERROR_CONFIG = 2,    /* an argument or a request is outside what can be done */
  SD_ERROR_BUNDLE = 3,    /* missing, incomplete, altered, of an unknown format */
  SD_ERROR_BACKEND = 4,   /* an inference backend failed; out of memory */
  SD_ERROR_CANCELLED = 6, /* the job was cancelled */
  SD_ERROR_BUSY = 7,      /* the queue is full: ask again later */
  SD_ERROR_NOT_ENDED = 8  /* the job has not ended yet */
};

/* What a job is doing. From SD_JOB_SUCCEEDED on it has ended and changes no more. */
enum {
  SD_JOB_WAITING = 0,
  SD_JOB_RUNNING = 1, /* from its first step on */
  SD_JOB_SUCCEEDED = 2,
  SD_JOB_FAILED = 3,
  SD_JOB_CANCELLED = 4
};

typedef struct sd_progress {
  size_t struct_size;
  uint32_t step; /* steps done so far: 0 to num_steps */
  uint32_t num_steps; /* 0 before the first is done */
} sd_progress;

typedef struct sd_preview {
  size_t struct_size;
  uint32_t first_image; /* of the request, the first that is shown */
  uint32_t num_images;
  uint32_t height, width;
  const uint8_t *pixels; /* [num_images][height][width][3], gone when the callback returns */
} sd_preview;

/* Callbacks run in the thread that draws, which waits for them: be short. They may call anything
 * here but sd_context_close and sd_job_wait. user_data is sd_open_params', job_data sd_request's. */
typedef void (*sd_progress_callback)(void *user_data, void *job_data, sd_job *job,
                                     const sd_progress *progress);
typedef void (*sd_preview_callback)(void *user_data, void *job_data, sd_job *job,
                                    const sd_preview *preview);

typedef struct sd_open_params {
  size_t struct_size;
  const char *bundle;  /* its folder; the one field that must be set */
  const char *backend; /* one of the bundle's; NULL: the fastest that runs here */
  uint32_t threads;    /* of a CPU backend; 0: its own choice */
  uint32_t queue_size; /* requests that may wait; 0: 16 */
  void *user_data;
  sd_progress_callback on_progress; /* after every step; NULL: none */
  sd_preview_callback on_preview;   /* as often as sd_request.previews says */
  /* LoRAs to put on the engines, "FILE.safetensors" or "FILE.safetensors=SCALE" each, the last one
   * followed by NULL; NULL: none. */
  const char *const *loras;
  /* A cudaStream_t for all work of the engines on a GPU, which must live until the context is
   * closed; NULL: one of their own. */
  void *cuda_stream;
  const char *precision; /* "int8", ...: the UNet's, of a bundle with several; NULL: not fp8 or int8 */
} sd_open_params;

typedef struct sd_request {
  size_t struct_size;
  const char *prompt;          /* must be set, here or in options_json */
  const char *negative_prompt; /* NULL: none */
  const char *scheduler;       /* "euler_a", ...; NULL: the checkpoint's own */
  const uint64_t *seed;        /* NULL: a random one */
  const double *guidance_scale; /* NULL: the bundle's */
  uint32_t num_inference_steps; /* 0: the bundle's */
  uint32_t num_images_per_prompt;
  /* A JSON object with any other field of sd_runtime.Request, such as "eta", or a list of
   * prompts; NULL: none. A field must not be given in both. */
  const char *options_json;
  const char *format; /* "png", "jpeg" or "webp": also encode, with the recipe; NULL: do not */
  uint32_t previews;  /* pictures on the way, evenly spread, to on_preview */
  /* Where the pictures are to go, uint8 [n][height][width][3], the caller's until sd_job_free;
   * NULL: into memory of the job's. */
  uint8_t *pixels;
  size_t pixels_bytes;
  void *job_data; /* for the callbacks; must live until the job has ended */
  uint32_t device_pixels; /* 1: keep the pictures for sd_job_device_pixels, too */
} sd_request;

typedef struct sd_file {
  const uint8_t *data;
  size_t bytes;
} sd_file;

/* All pointers are the job's and good until sd_job_free; pixels may be the caller's own. */
typedef struct sd_result {
  size_t struct_size;
  uint32_t num_images, height, width;
  uint32_t latent_channels, latent_height, latent_width;
  const uint8_t *pixels; /* [num_images][height][width][3] */
  const float *latents;  /* [num_images][latent_channels][latent_height][latent_width] */
  const uint8_t *nsfw_content_detected; /* [num_images] 0 or 1; NULL without a safety checker */
  const sd_file *files;                 /* [num_images]; NULL where no format was asked for */
  const char *json;                     /* "recipes" and "timings_ms" */
} sd_result;

uint32_t sd_abi_version(void);

int sd_status_code(const sd_status *status);            /* SD_OK of NULL */
const char *sd_status_message(const sd_status *status); /* what is wrong; "" of NULL */
const char *sd_status_hint(const sd_status *status);    /* what mends it; "" of NULL */
void sd_status_free(sd_status *status);
void sd_string_free(char *string);

/* Opens the bundle and its engines; the first call starts Python. */
sd_status *sd_context_open(const sd_open_params *params, sd_context **context);
/* Cancels all jobs, waits until they have ended (one step at most) and frees the engines. Jobs
 * and their results stay until they are freed. No other call may use the context meanwhile. */
sd_status *sd_context_close(sd_context *context);
/* A JSON object to free: "abi_version", "model", "profile", "profiles", "engines",
 * "schedulers". */
sd_status *sd_context_info(sd_context *context, char **json);
/* A JSON object to free: "waiting", "submitted", "succeeded", "failed", "cancelled", "images",
 * and "stages": by name, how often each ran and its time in ms. */
sd_status *sd_context_statistics(sd_context *context, char **json);

/* Checks the request, queues it and returns; nothing of the request is read after that. */
sd_status *sd_job_submit(sd_context *context, const sd_request *request, sd_job **job);
/* One of SD_JOB_...; progress may be NULL. */
int sd_job_poll(sd_job *job, sd_progress *progress);
/* Waits until it has ended, at most timeout_ms (less than 0: for ever); the same answer. */
int sd_job_wait(sd_job *job, int64_t timeout_ms);
/* Asks it to stop: at once where it waits, within a step where it runs. */
sd_status *sd_job_cancel(sd_job *job);
/* Its pictures, or why there are none. */
sd_status *sd_job_result(sd_job *job, sd_result *result);
/* Its pictures where the engines left them, on a GPU if they ran there: uint8 [n][height][width][3]
 * as DLPack's DLManagedTensor (dlpack.h declares it). Once, and only if sd_request.device_pixels
 * said so. It is complete, whatever stream reads it, is yours until you call its deleter, which must
 * come after all that reads it has ended, and may outlive the job and the context. */
sd_status *sd_job_device_pixels(sd_job *job, struct DLManagedTensor **tensor);
/* Cancels it if it has not ended. Afterwards the library does not touch the caller's pixels. */
void sd_job_free(sd_job *job);

#ifdef __cplusplus
}
#endif

#endif
