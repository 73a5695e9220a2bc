# find_package(fused_ebm) defines fused_ebm::fused_ebm: the header fused_ebm.h and libfused_ebm.so.
include(${CMAKE_CURRENT_LIST_DIR}/fused_ebm-targets.cmake)
