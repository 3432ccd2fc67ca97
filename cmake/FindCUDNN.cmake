# Finds cuDNN and the CUDA headers that cudnn.h includes; neither nvcc nor libcudart is needed.
#
#   find_package(CUDNN 9.0 [REQUIRED] [QUIET])
#
# Gives   CUDNN::cudnn, CUDNN_FOUND, CUDNN_VERSION, CUDNN_LIBRARY, CUDNN_INCLUDE_DIR (cudnn.h),
#         CUDNN_CUDA_INCLUDE_DIRS (cuda_runtime_api.h) and CUDNN_INCLUDE_DIRS (both).
# Reads   CUDNN_ROOT, then CUDAToolkit_ROOT, CUDA_HOME, CUDA_PATH: CMake or environment variables;
#         CUDNN_LIBRARY with CUDNN_INCLUDE_DIR, or CUDNN_CUDA_INCLUDE_DIRS, replace the search;
#         Python_EXECUTABLE, the interpreter asked for its NVIDIA wheels.
#         A CUDNN_ROOT without cuDNN, a path of these CUDNN_... that does not exist, or one of
#         CUDNN_LIBRARY and CUDNN_INCLUDE_DIR alone is an error, never a silent other choice.
# Order   what the user points to, the wheels, /usr/local/cuda, CMake's own search path.
#         The first place that has both the headers and the library is taken, so they match.

set(_cudnn_looked "") # one line per place that was refused, for the message of a failure

# Variables NAME... of CMake, or where one is not set there of the environment, as absolute paths.
function(_cudnn_paths_from out)
  set(paths "")
  foreach(name IN LISTS ARGN)
    set(values "${${name}}")
    if("${values}" STREQUAL "" AND DEFINED ENV{${name}}) # CMake's own wins, right or not
      file(TO_CMAKE_PATH "$ENV{${name}}" values)
    endif()
    foreach(value IN LISTS values)
      get_filename_component(value "${value}" ABSOLUTE)
      list(APPEND paths "${value}")
    endforeach()
  endforeach()
  list(REMOVE_DUPLICATES paths)
  set(${out} "${paths}" PARENT_SCOPE)
endfunction()

# The folders of Python packages, found without importing them: also right under build isolation.
function(_cudnn_package_folders out)
  set(${out} "" PARENT_SCOPE)
  if(NOT Python_EXECUTABLE)
    return()
  endif()
  set(script [[
import importlib.util, sys
for name in sys.argv[1:]:
    try:
        spec = importlib.util.find_spec(name)
    except ImportError:
        continue
    print(*(spec and spec.submodule_search_locations or ()), sep="\n")
]])
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "${script}" ${ARGN}
    OUTPUT_VARIABLE printed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  string(REGEX REPLACE "[\r\n]+" ";" folders "${printed}")
  list(REMOVE_ITEM folders "")
  set(${out} "${folders}" PARENT_SCOPE)
endfunction()

# find_path and find_library leave no cache entry here: a folder of an earlier build isolation is
# gone at the next build, and a new CUDNN_ROOT must win over an old answer.
function(_cudnn_look_for_header out header)
  unset(_cudnn_hit CACHE)
  find_path(_cudnn_hit "${header}" ${ARGN})
  set(${out} "${_cudnn_hit}" PARENT_SCOPE)
  unset(_cudnn_hit CACHE)
endfunction()

function(_cudnn_look_for_library out)
  unset(_cudnn_hit CACHE)
  # The wheel has libcudnn.so.9 only, and the soname is what must not change at run time.
  find_library(_cudnn_hit NAMES libcudnn.so.9 cudnn NAMES_PER_DIR ${ARGN})
  set(${out} "${_cudnn_hit}" PARENT_SCOPE)
  unset(_cudnn_hit CACHE)
endfunction()

# As much of major.minor.patch as the headers say; cudnn.h has it before cuDNN 8.
function(_cudnn_read_version out include_dir)
  set(version "")
  foreach(header IN ITEMS cudnn_version_v9.h cudnn_version.h cudnn.h)
    if("${version}" STREQUAL "" AND EXISTS "${include_dir}/${header}")
      file(STRINGS "${include_dir}/${header}" lines REGEX "#define[ \t]+CUDNN_[A-Z]+[ \t]+[0-9]")
      foreach(part IN ITEMS MAJOR MINOR PATCHLEVEL)
        if(NOT "${lines}" MATCHES "CUDNN_${part}[ \t]+([0-9]+)")
          break()
        endif()
        list(APPEND version "${CMAKE_MATCH_1}")
      endforeach()
    endif()
  endforeach()
  list(JOIN version "." version)
  set(${out} "${version}" PARENT_SCOPE)
endfunction()

# Why a cuDNN of this version does not serve, or nothing.
function(_cudnn_object_to_version out version)
  set(words "")
  set(asked "${CUDNN_FIND_VERSION}")
  if("${version}" STREQUAL "")
    set(words "its headers do not say which version they are")
  elseif(asked MATCHES "^${version}\\."
         AND (CUDNN_FIND_VERSION_EXACT OR version VERSION_LESS asked))
    set(words "its headers say version \"${version}\" and no more, and ${asked} is asked for")
  elseif(asked AND version VERSION_LESS asked)
    set(words "version \"${version}\" is older than ${asked}")
  elseif(NOT version MATCHES "^9(\\.|$)")
    set(words "version \"${version}\", and dgrad needs libcudnn.so.9")
  endif()
  set(${out} "${words}" PARENT_SCOPE)
endfunction()

# --- the places -----------------------------------------------------------------------------------
if(NOT Python_EXECUTABLE)
  find_package(Python QUIET COMPONENTS Interpreter)
endif()
_cudnn_paths_from(_cudnn_given CUDNN_ROOT)
_cudnn_paths_from(_cudnn_toolkits CUDAToolkit_ROOT CUDA_HOME CUDA_PATH)
_cudnn_package_folders(_cudnn_wheel nvidia.cudnn)
# CUDA 13 wheels share nvidia/cu13, CUDA 12 has a folder per wheel (crt/ comes with nvcc there).
# PyTorch's own wheels lack crt/, but Triton, which they need, carries a full set of headers.
_cudnn_package_folders(_cudnn_cuda_wheels nvidia.cu13 nvidia.cuda_runtime nvidia.cuda_nvcc)
_cudnn_package_folders(_cudnn_triton triton.backends.nvidia)

# --- what the user gives --------------------------------------------------------------------------
set(_cudnn_wrong "")
foreach(_cudnn_place IN LISTS _cudnn_given)
  if(NOT IS_DIRECTORY "${_cudnn_place}")
    string(APPEND _cudnn_wrong "\n  CUDNN_ROOT ${_cudnn_place}: no such folder")
  endif()
endforeach()
foreach(_cudnn_name IN ITEMS CUDNN_LIBRARY CUDNN_INCLUDE_DIR CUDNN_CUDA_INCLUDE_DIRS)
  set(_cudnn_places "")
  foreach(_cudnn_place IN LISTS ${_cudnn_name})
    get_filename_component(_cudnn_place "${_cudnn_place}" ABSOLUTE)
    list(APPEND _cudnn_places "${_cudnn_place}")
    if(_cudnn_place MATCHES "-NOTFOUND$")
      break()
    elseif(NOT EXISTS "${_cudnn_place}")
      string(APPEND _cudnn_wrong "\n  ${_cudnn_name} ${_cudnn_place}: does not exist")
    elseif(_cudnn_name STREQUAL "CUDNN_LIBRARY" AND IS_DIRECTORY "${_cudnn_place}")
      string(APPEND _cudnn_wrong "\n  ${_cudnn_name} ${_cudnn_place}: is a folder")
    elseif(_cudnn_name STREQUAL "CUDNN_INCLUDE_DIR" AND NOT EXISTS "${_cudnn_place}/cudnn.h")
      string(APPEND _cudnn_wrong "\n  ${_cudnn_name} ${_cudnn_place}: no cudnn.h")
    endif()
  endforeach()
  if(${_cudnn_name}) # an imported target takes no relative ones
    set(${_cudnn_name} "${_cudnn_places}")
  endif()
endforeach()
if(CUDNN_LIBRARY AND NOT CUDNN_INCLUDE_DIR)
  string(APPEND _cudnn_wrong "\n  CUDNN_LIBRARY ${CUDNN_LIBRARY}: give CUDNN_INCLUDE_DIR too")
elseif(CUDNN_INCLUDE_DIR AND NOT CUDNN_LIBRARY)
  string(APPEND _cudnn_wrong "\n  CUDNN_INCLUDE_DIR ${CUDNN_INCLUDE_DIR}: give CUDNN_LIBRARY too")
endif()

# --- cuDNN ----------------------------------------------------------------------------------------
if(_cudnn_wrong)
  string(APPEND _cudnn_looked "${_cudnn_wrong}")
  set(CUDNN_LIBRARY "CUDNN_LIBRARY-NOTFOUND")
elseif(NOT (CUDNN_LIBRARY AND CUDNN_INCLUDE_DIR))
  if(_cudnn_given)
    set(_cudnn_places ${_cudnn_given})
  else()
    set(_cudnn_places ${_cudnn_toolkits} ${_cudnn_wheel} /usr/local/cuda "the system")
    if(NOT _cudnn_wheel)
      string(APPEND _cudnn_looked
             "\n  wheel nvidia-cudnn: not installed for \"${Python_EXECUTABLE}\"")
    endif()
  endif()
  foreach(_cudnn_place IN LISTS _cudnn_places)
    if(_cudnn_place STREQUAL "the system")
      set(_cudnn_where "")
    else()
      set(_cudnn_where PATHS "${_cudnn_place}" NO_DEFAULT_PATH)
    endif()
    _cudnn_look_for_header(_cudnn_header_dir cudnn.h ${_cudnn_where} PATH_SUFFIXES include)
    _cudnn_look_for_library(_cudnn_library ${_cudnn_where}
                            PATH_SUFFIXES lib lib64 "lib/${CMAKE_LIBRARY_ARCHITECTURE}")
    _cudnn_read_version(_cudnn_version "${_cudnn_header_dir}")
    _cudnn_object_to_version(_cudnn_objection "${_cudnn_version}")
    if(NOT _cudnn_header_dir)
      string(APPEND _cudnn_looked "\n  ${_cudnn_place}: no cudnn.h")
    elseif(NOT _cudnn_library)
      string(APPEND _cudnn_looked "\n  ${_cudnn_place}: cudnn.h, but no libcudnn.so.9")
    elseif(_cudnn_objection)
      string(APPEND _cudnn_looked "\n  ${_cudnn_place}: ${_cudnn_objection}")
    else()
      set(CUDNN_INCLUDE_DIR "${_cudnn_header_dir}")
      set(CUDNN_LIBRARY "${_cudnn_library}")
      break()
    endif()
  endforeach()
endif()
if(CUDNN_LIBRARY AND CUDNN_INCLUDE_DIR)
  _cudnn_read_version(CUDNN_VERSION "${CUDNN_INCLUDE_DIR}")
  _cudnn_object_to_version(_cudnn_objection "${CUDNN_VERSION}")
  if(_cudnn_objection) # to what replaces the search
    string(APPEND _cudnn_looked "\n  ${CUDNN_INCLUDE_DIR}: ${_cudnn_objection}")
    set(CUDNN_LIBRARY "CUDNN_LIBRARY-NOTFOUND")
  endif()
endif()

# --- the CUDA headers that cudnn.h includes -------------------------------------------------------
if(NOT CUDNN_CUDA_INCLUDE_DIRS)
  # Several folders can be one place: the wheels put crt/ elsewhere than cuda_runtime_api.h.
  list(JOIN _cudnn_cuda_wheels "|" _cudnn_cuda_wheels)
  foreach(_cudnn_place IN ITEMS ${_cudnn_given} ${_cudnn_toolkits} ${_cudnn_cuda_wheels}
                                ${_cudnn_triton} /usr/local/cuda "the system")
    string(REPLACE "|" ";" _cudnn_where "${_cudnn_place}")
    if(_cudnn_place STREQUAL "the system")
      set(_cudnn_where "")
    else()
      set(_cudnn_where PATHS ${_cudnn_where} NO_DEFAULT_PATH)
    endif()
    _cudnn_look_for_header(_cudnn_runtime cuda_runtime_api.h ${_cudnn_where} PATH_SUFFIXES include)
    _cudnn_look_for_header(_cudnn_crt crt/host_defines.h ${_cudnn_where} PATH_SUFFIXES include)
    if(_cudnn_runtime AND _cudnn_crt)
      set(CUDNN_CUDA_INCLUDE_DIRS "${_cudnn_runtime}" "${_cudnn_crt}")
      list(REMOVE_DUPLICATES CUDNN_CUDA_INCLUDE_DIRS)
      break()
    elseif(_cudnn_runtime)
      set(_cudnn_missing "cuda_runtime_api.h, but no crt/host_defines.h (wheel nvidia-cuda-crt)")
    else()
      set(_cudnn_missing "no cuda_runtime_api.h")
    endif()
    string(APPEND _cudnn_looked "\n  ${_cudnn_place}: ${_cudnn_missing}")
  endforeach()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  CUDNN
  REQUIRED_VARS CUDNN_LIBRARY CUDNN_INCLUDE_DIR CUDNN_CUDA_INCLUDE_DIRS
  VERSION_VAR CUDNN_VERSION
  REASON_FAILURE_MESSAGE
    "\nLooked in:${_cudnn_looked}
Point CUDNN_ROOT to cuDNN and CUDAToolkit_ROOT to CUDA, or install the wheels nvidia-cudnn-cu13, \
nvidia-cuda-runtime and nvidia-cuda-crt for \"${Python_EXECUTABLE}\".\n")

if(CUDNN_FOUND)
  set(CUDNN_INCLUDE_DIRS "${CUDNN_INCLUDE_DIR}" ${CUDNN_CUDA_INCLUDE_DIRS})
  list(REMOVE_DUPLICATES CUDNN_INCLUDE_DIRS)
  if(NOT TARGET CUDNN::cudnn)
    add_library(CUDNN::cudnn SHARED IMPORTED)
    set_target_properties(
      CUDNN::cudnn PROPERTIES IMPORTED_LOCATION "${CUDNN_LIBRARY}"
                              INTERFACE_INCLUDE_DIRECTORIES "${CUDNN_INCLUDE_DIRS}")
  endif()
endif()
