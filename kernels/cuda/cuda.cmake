# libfused_ebm_cuda.so, which launches compiled models through the driver that it finds at run time:
#   cmake -S . -B build/cuda -DFUSED_EBM_CUDA=ON && cmake --build build/cuda
#   cmake --install build/cuda --prefix /usr/local
# Its package is fused_ebm_cuda: it is installed with or without fused_ebm, beside it.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(cuda ${CMAKE_CURRENT_LIST_DIR})
add_library(fused_ebm_cuda SHARED ${cuda}/fused_ebm_cuda.cpp ${cuda}/gpu.cpp ${cuda}/driver.cpp ${cuda}/file.cpp)
set_target_properties(fused_ebm_cuda PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}
                      LINK_DEPENDS ${cuda}/fused_ebm_cuda.map)
target_compile_definitions(fused_ebm_cuda PRIVATE FUSED_EBM_VERSION="${PROJECT_VERSION}")
target_compile_options(fused_ebm_cuda PRIVATE -Wall -Wextra)
target_include_directories(fused_ebm_cuda PRIVATE ${cuda} ${cuda}/../native INTERFACE $<INSTALL_INTERFACE:include>)
target_link_options(fused_ebm_cuda PRIVATE -Wl,--version-script=${cuda}/fused_ebm_cuda.map)
target_link_libraries(fused_ebm_cuda PRIVATE ${CMAKE_DL_LIBS})

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/fused_ebm_cuda)
install(TARGETS fused_ebm_cuda EXPORT fused_ebm_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${cuda}/fused_ebm_cuda.h DESTINATION include)
install(EXPORT fused_ebm_cuda NAMESPACE fused_ebm_cuda:: FILE fused_ebm_cuda-config.cmake DESTINATION ${package})
write_basic_package_version_file(fused_ebm_cuda-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/fused_ebm_cuda-config-version.cmake DESTINATION ${package})
