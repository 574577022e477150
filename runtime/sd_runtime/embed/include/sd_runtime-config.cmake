# find_package(sd_runtime CONFIG REQUIRED PATHS FOLDER), then link with sd::runtime.
if(NOT TARGET sd::runtime)
  add_library(sd::runtime SHARED IMPORTED)
  set_target_properties(sd::runtime PROPERTIES
    IMPORTED_LOCATION "${CMAKE_CURRENT_LIST_DIR}/libsd_runtime.so"
    IMPORTED_SONAME "libsd_runtime.so"
    INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}")
endif()
