/* Opens the bundle that is named, and ends with the status's code; its message on stderr. */
#include <stdio.h>

#include "sd_runtime.h"

int main(int count, char **arguments) {
  if (count != 2) return 99;
  sd_open_params parameters = {.struct_size = sizeof parameters, .bundle = arguments[1]};
  sd_context *context = NULL;
  sd_status *status = sd_context_open(&parameters, &context);
  int code = sd_status_code(status);
  if (status != NULL) fprintf(stderr, "%s\n", sd_status_message(status));
  sd_status_free(status);
  sd_context_close(context);
  return code;
}
