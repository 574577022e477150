/* Between the C functions that a program calls and the Python that answers them (door.py). */
#ifndef SD_DOOR_H
#define SD_DOOR_H

#include "sd_runtime.h"

#ifdef __cplusplus
#error "the library is C"
#endif

/* Begin of what cffi reads. */

/* For Python: what it makes and reports. Strings are copied. */
sd_status *status_new(int code, const char *message, const char *hint);
sd_status *status_out_of_memory(void);
char *string_new(const char *text);
void job_report(sd_job *job, uint32_t step, uint32_t num_steps);
void job_preview(sd_job *job, uint32_t first_image, uint32_t num_images, uint32_t height,
                 uint32_t width, const uint8_t *pixels);
/* Copies all that result points to; out of memory fails the job. Takes device_pixels, which is what
 * sd_job_device_pixels is to give, or NULL. */
void job_succeed(sd_job *job, const sd_result *result, struct DLManagedTensor *device_pixels);
/* Takes the status, whose code says whether it was cancelled. */
void job_fail(sd_job *job, sd_status *status);

/* Answered by Python, as all that begins with door_. Structs have been copied by params_copy. */
sd_status *door_open(const sd_open_params *params, sd_context *context);
sd_status *door_close(sd_context *context);
sd_status *door_info(sd_context *context, char **json);
sd_status *door_statistics(sd_context *context, char **json);
sd_status *door_submit(sd_context *context, const sd_request *request, sd_job *job);
sd_status *door_cancel(sd_job *job);

/* End of what cffi reads. */

struct sd_context {
  void *user_data;
  sd_progress_callback on_progress;
  sd_preview_callback on_preview;
};

/* Of an argument that cannot be taken: SD_ERROR_CONFIG. */
sd_status *status_wrong(const char *message, const char *hint);

/* Starts Python where none runs and loads door.py; NULL, or why not. */
sd_status *interpreter_start(void);

/* Copies a caller's struct of any version into ours; the first version had first_bytes. */
sd_status *params_copy(void *ours, size_t ours_bytes, size_t first_bytes, const void *theirs,
                       const char *name);

/* A job with two owners, the caller and the library; NULL where memory is out. */
sd_job *job_new(const sd_context *context, const sd_request *request);
/* Undoes job_new where the library never took it. */
void job_discard(sd_job *job);

#endif
