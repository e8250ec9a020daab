// A training step of kernels written by hand: a net of two layers, forward and backward, and AdamW, which clips what it
// reads by what gradprobe has left in device memory. Between `backward_hidden` and `count_step` stands gradprobe's one
// launch, `measure`; a launch that clips the gradients there is not.
//
// One thread computes one number, and sums run over a loop in that thread: plain rather than fast. AdamW is as one would
// have it in earnest. All kernels take blocks of one dimension and of any size.
//
// A captured graph replays with the arguments of its capture. So what changes from step to step lies on the device: the
// number of the batch follows from the step that gradprobe counts, and Adam's own step, which is not that one once a step
// has been skipped, is counted by `count_step`.
#include <gradprobe.h>

// main.rs and its modules have the same.
constexpr unsigned INPUTS = 2, HIDDEN = 50, BATCH = 64, BATCHES = 16;

// The index of this thread in the launch.
__device__ unsigned thread_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

// The batch whose turn it is. `step` is how many steps were measured, and until this step's `measure` the number of those
// before it, skipped ones included: after the last batch comes the first.
__device__ unsigned batch(const gradprobe_step_outputs *outputs) { return (unsigned)(outputs->step % BATCHES); }

// activations[sample][unit] = tanh(bias[unit] + weight[unit] · inputs[sample])
extern "C" __global__ void forward_hidden(const gradprobe_step_outputs *outputs, const float *inputs,
                                          const float *weight, const float *bias, float *activations) {
    unsigned sample = thread_index() / HIDDEN, unit = thread_index() % HIDDEN;
    if (sample >= BATCH) return;
    const float *input = inputs + (batch(outputs) * BATCH + sample) * INPUTS;
    float sum = bias[unit];
    for (unsigned i = 0; i < INPUTS; i++) sum += weight[unit * INPUTS + i] * input[i];
    activations[sample * HIDDEN + unit] = tanhf(sum);
}

// errors[sample] = bias + weight · activations[sample] - targets[sample]
extern "C" __global__ void forward_output(const gradprobe_step_outputs *outputs, const float *targets,
                                          const float *activations, const float *weight, const float *bias,
                                          float *errors) {
    unsigned sample = thread_index();
    if (sample >= BATCH) return;
    float sum = bias[0];
    for (unsigned unit = 0; unit < HIDDEN; unit++) sum += weight[unit] * activations[sample * HIDDEN + unit];
    errors[sample] = sum - targets[batch(outputs) * BATCH + sample];
}

// The loss is the mean of the squared errors, so that error · 2 / BATCH is its derivative by a prediction. The thread of
// the bias, which goes through all errors, writes the loss too, in the place of its batch.
extern "C" __global__ void backward_output(const gradprobe_step_outputs *outputs, const float *activations,
                                           const float *errors, float *weight_gradient, float *bias_gradient,
                                           float *losses) {
    unsigned unit = thread_index();
    if (unit < HIDDEN) {
        float sum = 0;
        for (unsigned sample = 0; sample < BATCH; sample++) sum += errors[sample] * activations[sample * HIDDEN + unit];
        weight_gradient[unit] = sum * 2 / BATCH;
    } else if (unit == HIDDEN) {
        float sum = 0, squares = 0;
        for (unsigned sample = 0; sample < BATCH; sample++) {
            sum += errors[sample];
            squares += errors[sample] * errors[sample];
        }
        bias_gradient[0] = sum * 2 / BATCH;
        losses[batch(outputs)] = squares / BATCH;
    }
}

// Of each unit INPUTS weights and, as if it were the weight of an input that is always 1, the bias. The derivative of tanh
// is 1 - tanh².
extern "C" __global__ void backward_hidden(const gradprobe_step_outputs *outputs, const float *inputs,
                                           const float *activations, const float *errors, const float *output_weight,
                                           float *weight_gradient, float *bias_gradient) {
    unsigned unit = thread_index() / (INPUTS + 1), input = thread_index() % (INPUTS + 1);
    if (unit >= HIDDEN) return;
    float sum = 0;
    for (unsigned sample = 0; sample < BATCH; sample++) {
        float activation = activations[sample * HIDDEN + unit];
        float value = input == INPUTS ? 1 : inputs[(batch(outputs) * BATCH + sample) * INPUTS + input];
        sum += errors[sample] * (1 - activation * activation) * value;
    }
    float gradient = sum * output_weight[unit] * 2 / BATCH;
    if (input == INPUTS) {
        bias_gradient[unit] = gradient;
    } else {
        weight_gradient[unit * INPUTS + input] = gradient;
    }
}

// Counts a step that is not skipped, and computes what Adam's averages are divided by in it, since they begin at 0:
// 1 - beta1^step and 1 - beta2^step, in f64, because both powers are close to 1 for long. A learning rate with a schedule
// would follow from the step here as well. It is a launch of its own because AdamW's blocks run in any order: none of them
// may count while another still has to read.
extern "C" __global__ void count_step(const gradprobe_step_outputs *outputs, unsigned long long *step,
                                      float *corrections, float beta1, float beta2) {
    if (thread_index() != 0 || outputs->skip) return;
    *step += 1;
    corrections[0] = (float)(1.0 - pow((double)beta1, (double)*step));
    corrections[1] = (float)(1.0 - pow((double)beta2, (double)*step));
}

// AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2) of `length` parameters, of which
// the first `decayed` decay; as in PyTorch the decay is multiplied by the learning rate. The clip is the one
// multiplication by `coefficient`, of a gradient that is read anyway; a skipped step is a read of `skip`.
extern "C" __global__ void adamw(const gradprobe_step_outputs *outputs, const float *corrections, float *parameters,
                                 const float *gradients, float *exp_avg, float *exp_avg_sq, unsigned long long length,
                                 unsigned long long decayed, float learning_rate, float beta1, float beta2,
                                 float epsilon, float weight_decay) {
    if (outputs->skip) return;
    float coefficient = outputs->coefficient, correction1 = corrections[0], correction2 = corrections[1];
    unsigned long long threads = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = thread_index(); i < length; i += threads) {
        float gradient = coefficient * gradients[i], parameter = parameters[i];
        float m = beta1 * exp_avg[i] + (1 - beta1) * gradient;
        float v = beta2 * exp_avg_sq[i] + (1 - beta2) * gradient * gradient;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        if (i < decayed) parameter -= learning_rate * weight_decay * parameter;
        parameters[i] = parameter - learning_rate * (m / correction1) / (sqrtf(v / correction2) + epsilon);
    }
}
