/* What crosses the boundary: statuses, pictures, nothing else. boundary LIBRARY BUNDLE PIXELS
 * writes the pixels of one picture, prints only what went wrong. The library is loaded as a
 * plug-in would be: late, and out of sight of others. */
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <unistd.h>

#include "sd_runtime.h"

#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition)) {                                              \
      fprintf(stderr, "line %d: not %s\n", __LINE__, #condition);    \
      exit(1);                                                       \
    }                                                                \
  } while (0)
#define FROM(library, name) \
  __typeof__(&name) name;  \
  *(void **)&name = dlsym(library, #name)
#define NUM_SIGNALS 32

static volatile sig_atomic_t interrupts;

static void interrupted(int number) { interrupts += number == SIGINT; }

static volatile sig_atomic_t slowly;

static void slow_down(void *user_data, void *job_data, sd_job *job, const sd_progress *progress) {
  (void)job, (void)progress;
  if (slowly && user_data == NULL && job_data == NULL) usleep(20000);
}

static void read_dispositions(struct sigaction *all) {
  for (int number = 1; number < NUM_SIGNALS; number++) sigaction(number, NULL, &all[number]);
}

static __typeof__(&sd_job_wait) wait_for_job;

static void *wait_for_ever(void *job) {
  wait_for_job(job, -1);
  return NULL;
}

static __typeof__(&sd_job_submit) submit_job;

struct submission {
  sd_context *context;
  const sd_request *request;
};

static void *submit(void *argument) {
  const struct submission *asked = argument;
  sd_job *job;
  return submit_job(asked->context, asked->request, &job);
}

/* What a request comes to in a thread with as little stack as some servers give one. */
static sd_status *submit_from_little_stack(sd_context *context, const sd_request *request) {
  struct submission asked = {context, request};
  pthread_attr_t little;
  pthread_t thread;
  void *status;
  CHECK(pthread_attr_init(&little) == 0 && pthread_attr_setstacksize(&little, 256 << 10) == 0);
  CHECK(pthread_create(&thread, &little, submit, &asked) == 0);
  CHECK(pthread_join(thread, &status) == 0 && pthread_attr_destroy(&little) == 0);
  return status;
}

int main(int argc, char **argv) {
  CHECK(argc == 4);
  signal(SIGINT, interrupted);
  struct sigaction before[NUM_SIGNALS], after[NUM_SIGNALS];
  read_dispositions(before);
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  CHECK(library != NULL);
  FROM(library, sd_abi_version);
  FROM(library, sd_context_open);
  FROM(library, sd_context_close);
  FROM(library, sd_context_info);
  FROM(library, sd_context_statistics);
  FROM(library, sd_job_submit);
  FROM(library, sd_job_poll);
  FROM(library, sd_job_wait);
  FROM(library, sd_job_cancel);
  FROM(library, sd_job_result);
  FROM(library, sd_job_device_pixels);
  FROM(library, sd_job_free);
  FROM(library, sd_status_code);
  FROM(library, sd_status_message);
  FROM(library, sd_status_hint);
  FROM(library, sd_status_free);
  FROM(library, sd_string_free);
#define FAILS(call, expected, words)                                 \
  do {                                                               \
    sd_status *status = (call);                                      \
    if (strstr(sd_status_message(status), words) == NULL)            \
      fprintf(stderr, "%s\n", sd_status_message(status));            \
    CHECK(strstr(sd_status_message(status), words) != NULL);         \
    CHECK(sd_status_code(status) == (expected));                     \
    CHECK(strlen(sd_status_hint(status)) > 0);                       \
    sd_status_free(status);                                          \
  } while (0)

  CHECK(sd_abi_version() == SD_ABI_VERSION);
  CHECK(sd_status_code(NULL) == SD_OK);
  sd_status_free(NULL);
  sd_job_free(NULL);
  sd_string_free(NULL);

  sd_context *context;
  sd_open_params params = {0};
  FAILS(sd_context_open(NULL, &context), SD_ERROR_CONFIG, "sd_open_params is NULL");
  FAILS(sd_context_open(&params, &context), SD_ERROR_CONFIG, "struct_size");
  params.struct_size = sizeof params;
  FAILS(sd_context_open(&params, NULL), SD_ERROR_CONFIG, "context is NULL");
  FAILS(sd_context_open(&params, &context), SD_ERROR_CONFIG, "bundle is NULL");
  params.bundle = "/no/such/b\xc3\xbcndel";
  setenv("SD_RUNTIME_PYTHON", "/no/such/python", 1);
  FAILS(sd_context_open(&params, &context), SD_ERROR, "no Python at /no/such/python");
  unsetenv("SD_RUNTIME_PYTHON");
  FAILS(sd_context_open(&params, &context), SD_ERROR_BUNDLE, "/no/such/b\xc3\xbcndel");
  CHECK(context == NULL);
  params.bundle = argv[2];
  params.backend = "abacus";
  FAILS(sd_context_open(&params, &context), SD_ERROR_CONFIG, "abacus");
  params.backend = "onnxruntime";
  params.precision = "fp12";
  FAILS(sd_context_open(&params, &context), SD_ERROR_CONFIG, "unknown precision 'fp12'");
  params.precision = "fp8";
  FAILS(sd_context_open(&params, &context), SD_ERROR_BUNDLE, "has no fp8 onnxruntime engine");
  params.precision = NULL;
  const char *loras[] = {"/no/such/l\xc3\xb6ra.safetensors=0.5", NULL};
  params.loras = loras;
  FAILS(sd_context_open(&params, &context), SD_ERROR_CONFIG, "/no/such/l\xc3\xb6ra.safetensors");
  CHECK(context == NULL);
  params.struct_size = offsetof(sd_open_params, loras); /* a program of before: not read */
  params.threads = 1;
  params.on_progress = slow_down;
  CHECK(sd_context_open(&params, &context) == NULL);

  sd_job *job;
  sd_request request = {.struct_size = sizeof request};
  FAILS(sd_job_submit(NULL, &request, &job), SD_ERROR_CONFIG, "context is NULL");
  FAILS(sd_job_submit(context, NULL, &job), SD_ERROR_CONFIG, "sd_request is NULL");
  FAILS(sd_job_submit(context, &request, &job), SD_ERROR_CONFIG, "no prompt");
  request.prompt = "\xff";
  FAILS(sd_job_submit(context, &request, &job), SD_ERROR_CONFIG, "not UTF-8");
  request.prompt = "a cat";
  request.options_json = "{\"eta\": ";
  FAILS(sd_job_submit(context, &request, &job), SD_ERROR_CONFIG, "options_json");
  request.options_json = "[]";
  FAILS(sd_job_submit(context, &request, &job), SD_ERROR_CONFIG, "no object");
  char nested[2048] = "{\"eta\": ";
  memset(nested + strlen(nested), '[', 900);
  memset(nested + strlen(nested), ']', 900);
  strcat(nested, "}");
  request.options_json = nested;
  submit_job = sd_job_submit;
  FAILS(submit_from_little_stack(context, &request), SD_ERROR_CONFIG, "more than 16 deep");
  request.options_json = "{\"prompt\": \"a dog\"}";
  FAILS(sd_job_submit(context, &request, &job), SD_ERROR_CONFIG, "twice");
  request.options_json = "{\"etta\": 0}";
  FAILS(sd_job_submit(context, &request, &job), SD_ERROR_CONFIG, "etta");
  request.options_json = "{\"eta\": 0.5}";
  request.format = "gif";
  FAILS(sd_job_submit(context, &request, &job), SD_ERROR_CONFIG, "gif");
  char *long_prompt = malloc(70001);
  CHECK(long_prompt != NULL);
  memset(long_prompt, 'a', 70000);
  long_prompt[70000] = 0;
  request.prompt = long_prompt;
  request.scheduler = "ddim";
  request.format = "jpeg";
  FAILS(sd_job_submit(context, &request, &job), SD_ERROR_CONFIG, "recipe is");
  free(long_prompt);
  request.prompt = "a cat";
  request.scheduler = NULL;
  request.format = NULL;
  uint8_t pixels[64 * 64 * 3];
  request.pixels = pixels;
  request.pixels_bytes = sizeof pixels - 1;
  FAILS(sd_job_submit(context, &request, &job), SD_ERROR_CONFIG, "12287 bytes");
  request.pixels_bytes = sizeof pixels;
  CHECK(job == NULL);

  /* A program of tomorrow, with a field that this library does not know. */
  struct {
    sd_request known;
    uint64_t unknown;
  } newer = {request, 1};
  newer.known.struct_size = sizeof newer;
  FAILS(sd_job_submit(context, &newer.known, &job), SD_ERROR_CONFIG, "does not know");
  newer.unknown = 0;
  const uint64_t seed = 5;
  newer.known.seed = &seed;
  newer.known.scheduler = "ddim";
  newer.known.num_inference_steps = 3;
  sd_result result = {.struct_size = sizeof result};
  CHECK(sd_job_submit(context, &newer.known, &job) == NULL);
  raise(SIGINT); /* the caller's business alone */
  CHECK(sd_job_wait(job, 60000) == SD_JOB_SUCCEEDED);
  CHECK(sd_job_poll(job, NULL) == SD_JOB_SUCCEEDED);
  CHECK(sd_job_cancel(job) == NULL);
  CHECK(sd_job_result(job, &result) == NULL);
  CHECK(result.pixels == pixels && result.num_images == 1);
  CHECK(result.height == 64 && result.width == 64 && result.latent_channels == 4);
  CHECK(result.files == NULL && result.nsfw_content_detected == NULL);
  CHECK(strstr(result.json, "\"seed\": 5") != NULL);
  sd_job_free(job);
  FILE *file = fopen(argv[3], "wb");
  CHECK(file != NULL && fwrite(pixels, sizeof pixels, 1, file) == 1 && fclose(file) == 0);

  /* The same into memory of the job's, which outlives the context. */
  newer.known.pixels = NULL;
  CHECK(sd_job_submit(context, &newer.known, &job) == NULL);
  CHECK(sd_job_wait(job, -1) == SD_JOB_SUCCEEDED);
  char *text;
  CHECK(sd_context_info(context, &text) == NULL);
  CHECK(strstr(text, "\"abi_version\": 1") != NULL && strstr(text, "\"euler_a\"") != NULL);
  sd_string_free(text);
  CHECK(sd_context_statistics(context, &text) == NULL);
  CHECK(strstr(text, "\"succeeded\": 2") != NULL && strstr(text, "\"unet\"") != NULL);
  sd_string_free(text);

  slowly = 1;
  sd_job *unfinished;
  newer.known.num_inference_steps = 900;
  newer.known.device_pixels = 1;
  CHECK(sd_job_submit(context, &newer.known, &unfinished) == NULL);
  CHECK(sd_job_wait(unfinished, 1) < SD_JOB_SUCCEEDED);
  pthread_t waiting; /* and cancelled: it must not take the job's lock with it */
  wait_for_job = sd_job_wait;
  CHECK(pthread_create(&waiting, NULL, wait_for_ever, unfinished) == 0);
  usleep(100000);
  CHECK(pthread_cancel(waiting) == 0 && pthread_join(waiting, NULL) == 0);
  alarm(60);
  CHECK(sd_job_poll(unfinished, NULL) < SD_JOB_SUCCEEDED);
  alarm(0);
  sd_result none = {.struct_size = sizeof none};
  FAILS(sd_job_result(unfinished, &none), SD_ERROR_NOT_ENDED, "not ended");
  struct DLManagedTensor *tensor = (struct DLManagedTensor *)&none;
  FAILS(sd_job_device_pixels(unfinished, &tensor), SD_ERROR_NOT_ENDED, "not ended");
  CHECK(tensor == NULL);
  FAILS(sd_job_device_pixels(NULL, &tensor), SD_ERROR_CONFIG, "job is NULL");
  FAILS(sd_job_device_pixels(unfinished, NULL), SD_ERROR_CONFIG, "tensor is NULL");
  CHECK(sd_context_close(context) == NULL);
  FAILS(sd_context_close(context), SD_ERROR_CONFIG, "the context is closed");
  CHECK(sd_job_poll(unfinished, NULL) == SD_JOB_CANCELLED);
  FAILS(sd_job_result(unfinished, &none), SD_ERROR_CANCELLED, "cancelled");
  FAILS(sd_job_device_pixels(unfinished, &tensor), SD_ERROR_CANCELLED, "cancelled");
  sd_job_free(unfinished);
  CHECK(sd_job_result(job, &result) == NULL);
  CHECK(result.pixels != pixels && memcmp(result.pixels, pixels, sizeof pixels) == 0);
  sd_job_free(job);

  CHECK(interrupts == 1);
  read_dispositions(after);
  for (int number = 1; number < NUM_SIGNALS; number++)
    CHECK(before[number].sa_handler == after[number].sa_handler);
  return 0;
}
