# Finds the dependencies of wandb_restore.hpp on the system. Both the build and the installed package include this file
# (find_package(wandb_restore) runs the latter), so both look in the same places, in the same order.
#
#   wandb_restore_find_json()      makes wandb_restore::json, nlohmann/json
#   wandb_restore_find_openssl()   makes OpenSSL::SSL and OpenSSL::Crypto
#   wandb_restore_find_threads()   makes Threads::Threads
#
# Each sets wandb_restore_problem in its caller: empty, or a sentence that names the missing dependency.

# Calls find_package. If WANDB_RESTORE_GLOBAL_TARGETS is set, as in a build, the imported targets become visible in every
# directory of an embedding project: the link interface of wandb_restore::wandb_restore names them.
function(wandb_restore_find_package package)
  cmake_parse_arguments(arg "" "" "TARGETS;OPTIONS" ${ARGN})
  if(WANDB_RESTORE_GLOBAL_TARGETS)
    set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL TRUE) # CMake 3.24; before it, the loop below
  endif()
  set(fresh "")
  foreach(target IN LISTS arg_TARGETS)
    if(NOT TARGET ${target})
      list(APPEND fresh ${target})
    endif()
  endforeach()
  find_package(${package} ${arg_OPTIONS} QUIET)
  foreach(target IN LISTS fresh)
    if(WANDB_RESTORE_GLOBAL_TARGETS AND TARGET ${target})
      get_target_property(global ${target} IMPORTED_GLOBAL)
      if(NOT global)
        set_target_properties(${target} PROPERTIES IMPORTED_GLOBAL TRUE)
      endif()
    endif()
  endforeach()
  set(${package}_FOUND "${${package}_FOUND}" PARENT_SCOPE)
endfunction()

function(wandb_restore_make_target name)
  if(WANDB_RESTORE_GLOBAL_TARGETS)
    add_library(${name} INTERFACE IMPORTED GLOBAL)
  else()
    add_library(${name} INTERFACE IMPORTED)
  endif()
endfunction()

function(wandb_restore_find_threads)
  set(THREADS_PREFER_PTHREAD_FLAG TRUE)
  wandb_restore_find_package(Threads TARGETS Threads::Threads)
  if(TARGET Threads::Threads)
    set(wandb_restore_problem "" PARENT_SCOPE)
  else()
    set(wandb_restore_problem "No thread library was found." PARENT_SCOPE)
  endif()
endfunction()

function(wandb_restore_find_openssl)
  wandb_restore_find_package(OpenSSL TARGETS OpenSSL::SSL OpenSSL::Crypto)
  if(TARGET OpenSSL::SSL AND TARGET OpenSSL::Crypto)
    set(wandb_restore_problem "" PARENT_SCOPE)
  else()
    set(wandb_restore_problem
        "OpenSSL was not found: install libssl-dev or openssl-devel, set OPENSSL_ROOT_DIR, or set WANDB_RESTORE_OPENSSL to OFF."
        PARENT_SCOPE)
  endif()
endfunction()

function(wandb_restore_find_json)
  set(wandb_restore_problem "" PARENT_SCOPE)
  if(TARGET wandb_restore::json)
    return()
  endif()
  wandb_restore_find_package(nlohmann_json TARGETS nlohmann_json::nlohmann_json OPTIONS CONFIG)
  if(TARGET nlohmann_json::nlohmann_json)
    wandb_restore_make_target(wandb_restore::json)
    set_target_properties(wandb_restore::json PROPERTIES INTERFACE_LINK_LIBRARIES nlohmann_json::nlohmann_json)
    return()
  endif()
  find_path(WANDB_RESTORE_JSON_INCLUDE_DIR nlohmann/json.hpp)
  mark_as_advanced(WANDB_RESTORE_JSON_INCLUDE_DIR)
  if(WANDB_RESTORE_JSON_INCLUDE_DIR)
    wandb_restore_make_json("${WANDB_RESTORE_JSON_INCLUDE_DIR}")
    return()
  endif()
  set(wandb_restore_problem
      "nlohmann/json was not found: install nlohmann-json3-dev or json-devel, or set WANDB_RESTORE_JSON_INCLUDE_DIR to the folder that holds nlohmann/json.hpp."
      PARENT_SCOPE)
endfunction()

function(wandb_restore_make_json folder)
  wandb_restore_make_target(wandb_restore::json)
  set_target_properties(wandb_restore::json PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${folder}")
endfunction()
