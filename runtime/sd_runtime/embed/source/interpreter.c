/* Starts Python once in a process, in the environment that the library was built from, and leaves
 * it running: numpy and the backends cannot be loaded twice. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <locale.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "door.h"

PyMODINIT_FUNC PyInit__sd_runtime_door(void); /* what cffi generates */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool is_open;

/* Extension modules expect Python's symbols in sight, also where this library was loaded by
 * dlopen with RTLD_LOCAL. */
static void show_python_symbols(void) {
  Dl_info info;
  if (dladdr((void *)Py_IsInitialized, &info) != 0 && info.dli_fname != NULL)
    dlopen(info.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
}

/* Afterwards no thread holds the interpreter's lock. */
static sd_status *initialize(void) {
  const char *python = getenv("SD_RUNTIME_PYTHON");
  if (python == NULL || *python == 0) python = SD_PYTHON;
  if (access(python, X_OK) != 0) {
    char message[512];
    snprintf(message, sizeof message, "there is no Python at %.400s", python);
    return status_new(SD_ERROR, message,
                      "Set SD_RUNTIME_PYTHON to the python of the environment with sd-toolkit, or "
                      "build the library anew: python -m sd_runtime.embed FOLDER.");
  }
  show_python_symbols();
  /* Before 3.13 Python reads .pth files in the locale's encoding, UTF-8 mode or not. */
  locale_t utf8 = newlocale(LC_CTYPE_MASK, "C.UTF-8", (locale_t)0);
  locale_t callers = uselocale(utf8); /* of this thread; where there is none, no change */
  PyPreConfig before;
  PyPreConfig_InitIsolatedConfig(&before);
  before.utf8_mode = 1; /* file names are UTF-8, whatever the program's locale */
  PyStatus status = Py_PreInitialize(&before);
  if (!PyStatus_Exception(status)) {
    PyConfig config; /* isolated: no signal handlers, no PYTHON... variables, no command line */
    PyConfig_InitIsolatedConfig(&config);
    config.pathconfig_warnings = 0;
    status = PyConfig_SetBytesString(&config, &config.program_name, python);
    if (!PyStatus_Exception(status)) status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
  }
  uselocale(callers);
  if (utf8 != (locale_t)0) freelocale(utf8);
  if (PyStatus_Exception(status))
    return status_new(SD_ERROR, status.err_msg == NULL ? "Python does not start" : status.err_msg,
                      "Does the environment's own python start?");
  PyEval_SaveThread();
  return NULL;
}

/* The Python error that is set, as a status. */
static sd_status *raised(void) {
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyObject *text = value == NULL ? NULL : PyObject_Str(value);
  const char *message = text == NULL ? NULL : PyUnicode_AsUTF8(text);
  sd_status *status =
      status_new(SD_ERROR, message == NULL ? "sd_runtime cannot be imported" : message,
                 "Install it where the library looks: pip install \"sd-toolkit[cpu,embed]\".");
  PyErr_Clear();
  Py_XDECREF(text);
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(trace);
  return status;
}

static sd_status *open_door(bool owns_interpreter) {
  sd_status *status = NULL;
  PyObject *native = PyInit__sd_runtime_door();
  PyObject *door = native == NULL ? NULL : PyImport_ImportModule("sd_runtime.embed.door");
  PyObject *done = door == NULL ? NULL
                                : PyObject_CallMethod(door, "open_door", "OO", native,
                                                      owns_interpreter ? Py_True : Py_False);
  if (done == NULL) status = raised();
  Py_XDECREF(done);
  Py_XDECREF(door);
  Py_XDECREF(native);
  return status;
}

sd_status *interpreter_start(void) {
  /* Whoever comes with the interpreter's lock would wait with it for one that waits for it. */
  PyThreadState *held = Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : NULL;
  pthread_mutex_lock(&lock);
  sd_status *status = NULL;
  if (!is_open) {
    static bool owns_interpreter;
    if (!Py_IsInitialized()) {
      status = initialize();
      owns_interpreter = status == NULL;
    }
    if (status == NULL) {
      PyGILState_STATE state = PyGILState_Ensure();
      status = open_door(owns_interpreter);
      PyGILState_Release(state);
    }
    is_open = status == NULL;
  }
  pthread_mutex_unlock(&lock);
  if (held != NULL) PyEval_RestoreThread(held);
  return status;
}
