/* The structs that gradprobe leaves in device memory, for kernels and programs in C and C++: an optimizer's kernel reads
 * the step's coefficient from the one, a logger every tensor's statistics from the other.
 *
 * For C11, C++17, nvcc and NVRTC. src/measure/outputs.rs and src/measure/record.rs are the other side; tests/c_header.rs holds each field,
 * offset and constant here to those. Addresses come from `Probe::addresses()`. */
#ifndef GRADPROBE_H
#define GRADPROBE_H

#ifdef __CUDACC_RTC__
/* NVRTC has no headers of its own to include. */
typedef int gradprobe_i32;
typedef unsigned int gradprobe_u32;
typedef unsigned long long gradprobe_u64;
#else
#include <stdint.h>
typedef int32_t gradprobe_i32;
typedef uint32_t gradprobe_u32;
typedef uint64_t gradprobe_u64;
#endif

#ifdef __cplusplus
#define GRADPROBE_STATIC_ASSERT(condition, message) static_assert(condition, message)
#else
#define GRADPROBE_STATIC_ASSERT(condition, message) _Static_assert(condition, message)
#endif

/* Without <stddef.h>, offsets are known to the compilers that have this builtin; sizes are checked by all. */
#if (defined(__GNUC__) || defined(__clang__)) && !defined(__CUDACC_RTC__)
#define GRADPROBE_ASSERT_OFFSET(type, field, bytes)                                                                    \
    GRADPROBE_STATIC_ASSERT(__builtin_offsetof(type, field) == (bytes), #type "." #field)
#else
#define GRADPROBE_ASSERT_OFFSET(type, field, bytes) GRADPROBE_STATIC_ASSERT(1, "")
#endif

/* Bits of `action`: what the clip does; 0 is nothing. */
#define GRADPROBE_ACTION_SCALE 1u          /* every element is multiplied by `coefficient` */
#define GRADPROBE_ACTION_ZERO_NONFINITE 2u /* NaN and infinite elements become 0 */
#define GRADPROBE_ACTION_SCALE_TENSORS 4u  /* elements are multiplied by the coefficient of their tensor */
#define GRADPROBE_ACTION_CLAMP 8u          /* elements are brought between two limits */

/* Bits of `flags`; 0 is a clean, unclipped step. */
#define GRADPROBE_FLAG_NAN 1u         /* some element is NaN */
#define GRADPROBE_FLAG_INF 2u         /* some element is infinite */
#define GRADPROBE_FLAG_CLIPPED 4u     /* something is clipped */
#define GRADPROBE_FLAG_SKIP 8u        /* the step should be skipped */
#define GRADPROBE_FLAG_SPIKE 16u      /* the norm is an outlier by the z-score rule */
#define GRADPROBE_FLAG_LOSS_SCALE 32u /* the loss scale is not finite and above 0, and the step should be skipped */
#define GRADPROBE_FLAG_REPLICAS 64u   /* ranks hold other bits of a tensor, though they should be replicas */
#define GRADPROBE_FLAG_STATE 128u     /* ranks have come to this step with other states */

/* `first_nonfinite_index` of a record without a NaN or infinite element. */
#define GRADPROBE_NONE 0xffffffffffffffffull

/* What a step decided for all tensors together. An optimizer that multiplies by `coefficient` (or divides by
 * `inverse_coefficient`) and returns early on `skip` (or on `found_inf`) needs no clip pass. Norms are of unscaled
 * gradients; `coefficient` and `inverse_coefficient` unscale what they clip, and are 1 in a step to skip. */
typedef struct gradprobe_step_outputs {
    double total_norm;         /* L2 norm of all elements: NaN if any is NaN, else +Inf if any is infinite */
    double finite_total_norm;  /* L2 norm of the finite elements */
    double coefficient_f64;    /* min(1, max_norm / (norm + 1e-6)), or what another clip policy decided; 1 without one */
    float total_norm_f32;      /* `total_norm`, rounded */
    float coefficient;         /* `coefficient_f64` / `loss_scale`, rounded: what gradients are multiplied by */
    float inverse_coefficient; /* its inverse, for optimizers that divide */
    float found_inf;           /* 1 if any element is NaN or infinite, or the loss scale not usable, else 0 */
    gradprobe_i32 skip;        /* 1 if the optimizer should leave this step out, else 0 */
    gradprobe_u32 action;      /* bits GRADPROBE_ACTION_... */
    gradprobe_u32 flags;       /* bits GRADPROBE_FLAG_... */
    gradprobe_u32 weights;     /* 1 if the step measured the weights too, else 0 */
    gradprobe_u64 step;        /* steps measured by this probe, this one included */
    gradprobe_u64 nan_count;   /* NaN elements of all tensors */
    gradprobe_u64 inf_count;   /* infinite elements of all tensors */
    gradprobe_u32 health;      /* word by the rules of `Config::rules`, 0 when all is well or there are none */
    float loss_scale;          /* what the loss of this step was multiplied by, or 1 */
    float next_loss_scale;     /* and of the next */
    gradprobe_u32 reserved;           /* 0 */
} gradprobe_step_outputs;

GRADPROBE_STATIC_ASSERT(sizeof(gradprobe_step_outputs) == 96, "gradprobe_step_outputs");
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, coefficient_f64, 16);
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, total_norm_f32, 24);
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, coefficient, 28);
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, inverse_coefficient, 32);
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, found_inf, 36);
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, skip, 40);
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, action, 44);
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, flags, 48);
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, step, 56);
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, nan_count, 64);
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, inf_count, 72);
GRADPROBE_ASSERT_OFFSET(gradprobe_step_outputs, health, 80);

/* The statistics of a tensor, or of a run of its elements. Fields hold what merges (`Record::merge`, and `merge` of
 * gradprobe_epilogue.cuh). With m = count - nan_count - inf_count finite elements:
 *   mean            mean_or_zero                                     if m > 0
 *   mean |x|        sum_abs / m                                      if m > 0
 *   variance        sum_squared_deviations / m (or m - 1)            if m > 0 (or m > 1)
 *   sum of squares  m * mean_or_zero^2 + sum_squared_deviations
 *   L2 norm         its root; torch's is NaN if nan_count > 0, else +Inf if inf_count > 0
 *   zero fraction   zero_count / count                               if count > 0; and so for dead and NaN */
typedef struct gradprobe_record {
    gradprobe_u64 count;                 /* elements, finite or not */
    gradprobe_u64 nan_count;             /* elements that are NaN */
    gradprobe_u64 inf_count;             /* elements that are +Inf or -Inf */
    gradprobe_u64 zero_count;            /* elements equal to 0; -0 counts */
    gradprobe_u64 dead_count;            /* finite elements with |x| below the dead threshold; zeros count */
    gradprobe_u64 first_nonfinite_index; /* smallest index of a NaN or infinite element, or GRADPROBE_NONE */
    double mean_or_zero;                 /* mean of the finite elements; 0 when there are none */
    double sum_squared_deviations;       /* sum of (x - mean)^2 over the finite elements */
    double sum_abs;                      /* sum of |x| over the finite elements */
    float max_abs_or_zero;               /* largest |x| of the finite elements; 0 when there are none */
    float min_nonzero_abs_or_infinity;   /* smallest |x| > 0 of the finite elements; +Inf when there are none */
} gradprobe_record;

GRADPROBE_STATIC_ASSERT(sizeof(gradprobe_record) == 80, "gradprobe_record");
GRADPROBE_ASSERT_OFFSET(gradprobe_record, nan_count, 8);
GRADPROBE_ASSERT_OFFSET(gradprobe_record, inf_count, 16);
GRADPROBE_ASSERT_OFFSET(gradprobe_record, zero_count, 24);
GRADPROBE_ASSERT_OFFSET(gradprobe_record, dead_count, 32);
GRADPROBE_ASSERT_OFFSET(gradprobe_record, first_nonfinite_index, 40);
GRADPROBE_ASSERT_OFFSET(gradprobe_record, mean_or_zero, 48);
GRADPROBE_ASSERT_OFFSET(gradprobe_record, sum_squared_deviations, 56);
GRADPROBE_ASSERT_OFFSET(gradprobe_record, sum_abs, 64);
GRADPROBE_ASSERT_OFFSET(gradprobe_record, max_abs_or_zero, 72);
GRADPROBE_ASSERT_OFFSET(gradprobe_record, min_nonzero_abs_or_infinity, 76);

#endif
