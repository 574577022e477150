/* Statuses and strings: what the caller gets and frees. */
#include <stdlib.h>
#include <string.h>

#include "door.h"

struct sd_status {
  int code;
  char *message, *hint;
};

static sd_status out_of_memory = {
    SD_ERROR_BACKEND, (char *)"out of memory",
    (char *)"Close other programs, or use a larger machine."};

sd_status *status_out_of_memory(void) { return &out_of_memory; }

char *string_new(const char *text) { return strdup(text); }

void sd_string_free(char *string) { free(string); }

sd_status *status_new(int code, const char *message, const char *hint) {
  sd_status *status = malloc(sizeof *status);
  if (status == NULL) return &out_of_memory;
  *status = (sd_status){code, strdup(message), strdup(hint)};
  if (status->message == NULL || status->hint == NULL) {
    sd_status_free(status);
    return &out_of_memory;
  }
  return status;
}

sd_status *status_wrong(const char *message, const char *hint) {
  return status_new(SD_ERROR_CONFIG, message, hint);
}

int sd_status_code(const sd_status *status) { return status == NULL ? SD_OK : status->code; }

const char *sd_status_message(const sd_status *status) {
  return status == NULL ? "" : status->message;
}

const char *sd_status_hint(const sd_status *status) { return status == NULL ? "" : status->hint; }

void sd_status_free(sd_status *status) {
  if (status == NULL || status == &out_of_memory) return;
  free(status->message);
  free(status->hint);
  free(status);
}
