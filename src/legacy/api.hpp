// The three directions of the legacy API behind one set of names.
//
// cuDNN repeats each call for each direction with other enums and another order of arguments;
// Api<direction> holds exactly these differences, so that algorithms and plans are written once.
#pragma once

#include <cudnn.h>

#include <array>
#include <cstddef>

#include "error.hpp"
#include "legacy/descriptors.hpp"

namespace dgrad::legacy {

template <Direction direction>
struct Api;

template <>
struct Api<Direction::dgrad> {
    using Algorithm = cudnnConvolutionBwdDataAlgo_t;
    using Performance = cudnnConvolutionBwdDataAlgoPerf_t;
    static constexpr std::array<const char*, CUDNN_CONVOLUTION_BWD_DATA_ALGO_COUNT> names{
        "ALGO_0", "ALGO_1", "FFT", "FFT_TILING", "WINOGRAD", "WINOGRAD_NONFUSED"};

    static void heuristic(cudnnHandle_t handle, const Descriptors& d, int requested, int* returned,
                          Performance* results) {
        DGRAD_CUDNN_CHECK(cudnnGetConvolutionBackwardDataAlgorithm_v7(
            handle, d.w.get(), d.y.get(), d.convolution.get(), d.x.get(), requested, returned,
            results));
    }
    static void workspace(cudnnHandle_t handle, const Descriptors& d, Algorithm algorithm,
                          std::size_t* bytes) {
        DGRAD_CUDNN_CHECK(cudnnGetConvolutionBackwardDataWorkspaceSize(
            handle, d.w.get(), d.y.get(), d.convolution.get(), d.x.get(), algorithm, bytes));
    }
    static void run(cudnnHandle_t handle, const Descriptors& d, Algorithm algorithm, void* x,
                    void* w, void* y, void* workspace, std::size_t bytes, const void* one,
                    const void* zero) {
        DGRAD_CUDNN_CHECK(cudnnConvolutionBackwardData(handle, one, d.w.get(), w, d.y.get(), y,
                                                       d.convolution.get(), algorithm, workspace,
                                                       bytes, zero, d.x.get(), x));
    }
};

template <>
struct Api<Direction::fprop> {
    using Algorithm = cudnnConvolutionFwdAlgo_t;
    using Performance = cudnnConvolutionFwdAlgoPerf_t;
    static constexpr std::array<const char*, CUDNN_CONVOLUTION_FWD_ALGO_COUNT> names{
        "IMPLICIT_GEMM", "IMPLICIT_PRECOMP_GEMM", "GEMM", "DIRECT", "FFT", "FFT_TILING",
        "WINOGRAD",      "WINOGRAD_NONFUSED"};

    static void heuristic(cudnnHandle_t handle, const Descriptors& d, int requested, int* returned,
                          Performance* results) {
        DGRAD_CUDNN_CHECK(cudnnGetConvolutionForwardAlgorithm_v7(handle, d.x.get(), d.w.get(),
                                                                 d.convolution.get(), d.y.get(),
                                                                 requested, returned, results));
    }
    static void workspace(cudnnHandle_t handle, const Descriptors& d, Algorithm algorithm,
                          std::size_t* bytes) {
        DGRAD_CUDNN_CHECK(cudnnGetConvolutionForwardWorkspaceSize(
            handle, d.x.get(), d.w.get(), d.convolution.get(), d.y.get(), algorithm, bytes));
    }
    static void run(cudnnHandle_t handle, const Descriptors& d, Algorithm algorithm, void* x,
                    void* w, void* y, void* workspace, std::size_t bytes, const void* one,
                    const void* zero) {
        DGRAD_CUDNN_CHECK(cudnnConvolutionForward(handle, one, d.x.get(), x, d.w.get(), w,
                                                  d.convolution.get(), algorithm, workspace, bytes,
                                                  zero, d.y.get(), y));
    }
};

template <>
struct Api<Direction::wgrad> {
    using Algorithm = cudnnConvolutionBwdFilterAlgo_t;
    using Performance = cudnnConvolutionBwdFilterAlgoPerf_t;
    static constexpr std::array<const char*, CUDNN_CONVOLUTION_BWD_FILTER_ALGO_COUNT> names{
        "ALGO_0", "ALGO_1", "FFT", "ALGO_3", "WINOGRAD", "WINOGRAD_NONFUSED", "FFT_TILING"};

    static void heuristic(cudnnHandle_t handle, const Descriptors& d, int requested, int* returned,
                          Performance* results) {
        DGRAD_CUDNN_CHECK(cudnnGetConvolutionBackwardFilterAlgorithm_v7(
            handle, d.x.get(), d.y.get(), d.convolution.get(), d.w.get(), requested, returned,
            results));
    }
    static void workspace(cudnnHandle_t handle, const Descriptors& d, Algorithm algorithm,
                          std::size_t* bytes) {
        DGRAD_CUDNN_CHECK(cudnnGetConvolutionBackwardFilterWorkspaceSize(
            handle, d.x.get(), d.y.get(), d.convolution.get(), d.w.get(), algorithm, bytes));
    }
    static void run(cudnnHandle_t handle, const Descriptors& d, Algorithm algorithm, void* x,
                    void* w, void* y, void* workspace, std::size_t bytes, const void* one,
                    const void* zero) {
        DGRAD_CUDNN_CHECK(cudnnConvolutionBackwardFilter(handle, one, d.x.get(), x, d.y.get(), y,
                                                         d.convolution.get(), algorithm, workspace,
                                                         bytes, zero, d.w.get(), w));
    }
};

// Calls `function` with the Api of a direction known at run time only.
template <typename Function>
auto with_api(Direction direction, Function&& function) {
    switch (direction) {
        case Direction::dgrad:
            return function(Api<Direction::dgrad>{});
        case Direction::fprop:
            return function(Api<Direction::fprop>{});
        case Direction::wgrad:
            break;
    }
    return function(Api<Direction::wgrad>{});
}

}  // namespace dgrad::legacy
