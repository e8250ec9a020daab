// Kernels as the tests find them: by their names, with parameters that are only bytes, as the driver gets them.
#pragma once
#include "../../kernels/platform.cuh"
#include <utility>

constexpr u32 MAX_PARAMETERS = 16;

// src/block.rs has the same.
struct SimtKernel {
    const char *name;
    void (*call)(const void *const *parameters);
    u32 parameter_count;
    u32 parameter_bytes[MAX_PARAMETERS];
};

// The parameter at an address of any alignment.
template <typename P> P parameter(const void *address) {
    P value;
    memcpy(&value, address, sizeof value);
    return value;
}

template <auto kernel, typename Indices> struct Described;
template <typename... P, void (*kernel)(P...), size_t... I> struct Described<kernel, std::index_sequence<I...>> {
    static void call(const void *const *parameters) { kernel(parameter<P>(parameters[I])...); }
};

template <auto kernel, typename... P> constexpr SimtKernel described(const char *name, void (*)(P...)) {
    static_assert(sizeof...(P) <= MAX_PARAMETERS, "src/block.rs has room for so many");
    return {name, Described<kernel, std::index_sequence_for<P...>>::call, sizeof...(P), {(u32)sizeof(P)...}};
}
#define DESCRIBED(kernel) described<kernel>(#kernel, kernel)

// The kernel of this number in a list, or null behind the last.
template <size_t COUNT> const SimtKernel *kernel_at(const SimtKernel (&kernels)[COUNT], u32 index) {
    return index < COUNT ? &kernels[index] : nullptr;
}
