/* The functions that Python answers, and the checks before it is asked. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "door.h"

uint32_t sd_abi_version(void) { return SD_ABI_VERSION; }

/* What an older struct lacks is 0; a newer one is taken as long as what we do not know is 0. */
sd_status *params_copy(void *ours, size_t ours_bytes, size_t first_bytes, const void *theirs,
                       const char *name) {
  char message[96];
  size_t bytes = 0;
  if (theirs != NULL) memcpy(&bytes, theirs, sizeof bytes);
  if (bytes < first_bytes || bytes > 4096) {
    snprintf(message, sizeof message, "%s is NULL or its struct_size is wrong", name);
    return status_wrong(message, "Set struct_size to sizeof of the struct, and all else to 0.");
  }
  for (size_t i = ours_bytes; i < bytes; i++) {
    if (((const char *)theirs)[i] != 0) {
      snprintf(message, sizeof message, "%s has a field that this library does not know", name);
      return status_wrong(message, "Build the library anew: it is older than the header.");
    }
  }
  memset(ours, 0, ours_bytes);
  memcpy(ours, theirs, bytes < ours_bytes ? bytes : ours_bytes);
  return NULL;
}

sd_status *sd_context_open(const sd_open_params *params, sd_context **context) {
  if (context == NULL) return status_wrong("context is NULL", "Say where the context is to go.");
  *context = NULL;
  sd_open_params ours;
  const size_t first_bytes = offsetof(sd_open_params, loras);
  sd_status *status = params_copy(&ours, sizeof ours, first_bytes, params, "sd_open_params");
  if (status != NULL) return status;
  if (ours.bundle == NULL) return status_wrong("bundle is NULL", "Name the bundle's folder.");
  sd_context *made = malloc(sizeof *made);
  if (made == NULL) return status_out_of_memory();
  *made = (sd_context){ours.user_data, ours.on_progress, ours.on_preview};
  status = interpreter_start();
  if (status == NULL) status = door_open(&ours, made);
  if (status == NULL)
    *context = made;
  else
    free(made);
  return status;
}

sd_status *sd_context_close(sd_context *context) {
  if (context == NULL) return NULL;
  sd_status *status = door_close(context);
  if (status == NULL) free(context);
  return status;
}

static sd_status *ask(sd_context *context, char **json,
                      sd_status *(*question)(sd_context *, char **)) {
  if (json == NULL) return status_wrong("json is NULL", "Say where the text is to go.");
  *json = NULL;
  if (context == NULL) return status_wrong("context is NULL", "Open one first.");
  return question(context, json);
}

sd_status *sd_context_info(sd_context *context, char **json) {
  return ask(context, json, door_info);
}

sd_status *sd_context_statistics(sd_context *context, char **json) {
  return ask(context, json, door_statistics);
}

sd_status *sd_job_submit(sd_context *context, const sd_request *request, sd_job **job) {
  if (job == NULL) return status_wrong("job is NULL", "Say where the job is to go.");
  *job = NULL;
  if (context == NULL) return status_wrong("context is NULL", "Open one first.");
  sd_request ours;
  const size_t first_bytes = offsetof(sd_request, device_pixels);
  sd_status *status = params_copy(&ours, sizeof ours, first_bytes, request, "sd_request");
  if (status != NULL) return status;
  sd_job *made = job_new(context, &ours);
  if (made == NULL) return status_out_of_memory();
  status = door_submit(context, &ours, made);
  if (status == NULL)
    *job = made;
  else
    job_discard(made);
  return status;
}
