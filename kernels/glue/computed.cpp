// An MLX primitive whose values a function of ours computes: the one thing that mlx-c cannot make.
//
// The function is called once, on the thread of the CPU stream, when MLX evaluates the array. What it needs
// lives in a context that is dropped when neither the primitive nor the task refers to it any more.

#include <memory>
#include <utility>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/stream.h"

namespace {

namespace mx = mlx::core;

extern "C" {
typedef void (*mlx_pipe_run)(void* context, const float* const* inputs, float* output);
typedef void (*mlx_pipe_drop)(void* context);
}

class Computed : public mx::UnaryPrimitive {
 public:
  Computed(mx::Stream stream, std::shared_ptr<void> context, mlx_pipe_run run)
      : UnaryPrimitive(stream), context_(std::move(context)), run_(run) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& output) override {
    output.set_data(mx::allocator::malloc(output.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    std::vector<const float*> pointers;
    for (const auto& input : inputs) {
      if (input.dtype() != mx::float32 || !input.flags().row_contiguous) {
        throw std::invalid_argument("[mlx-pipe] a kernel's input is not contiguous f32");
      }
      encoder.set_input_array(input);
      pointers.push_back(input.data<float>());
    }
    encoder.set_output_array(output);
    encoder.dispatch([context = context_,
                      run = run_,
                      pointers = std::move(pointers),
                      result = output.data<float>()]() mutable {
      run(context.get(), pointers.data(), result);
    });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("[mlx-pipe] the CPU kernels do not run on a GPU");
  }

  const char* name() const override {
    return "MlxPipeComputed";
  }

 private:
  std::shared_ptr<void> context_;
  mlx_pipe_run run_;
};

} // namespace

// Sets `*result` (an `mlx::core::array*`, as in mlx-c) to an f32 array of this shape. Takes the context whatever
// happens. Returns 0, or 1 if MLX cannot.
extern "C" int mlx_pipe_computed(
    void** result,
    void* const* inputs,
    size_t input_count,
    const int* shape,
    size_t dimensions,
    void* context,
    mlx_pipe_run run,
    mlx_pipe_drop drop) {
  try {
    std::shared_ptr<void> owned(context, drop);
    std::vector<mx::array> arrays;
    for (size_t index = 0; index < input_count; ++index) {
      arrays.push_back(*static_cast<mx::array*>(inputs[index]));
    }
    auto stream = mx::default_stream(mx::Device(mx::Device::cpu));
    auto primitive = std::make_shared<Computed>(stream, std::move(owned), run);
    *result = new mx::array(
        mx::Shape(shape, shape + dimensions), mx::float32, std::move(primitive), std::move(arrays));
    return 0;
  } catch (...) {
    return 1;
  }
}
