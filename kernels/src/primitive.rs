//! An MLX array whose values a function computes, when MLX comes to evaluate it.

use mlx_rs::{Array, Dtype};
use std::ffi::{c_int, c_void};

/// Computes an array: `inputs` as they were given, row-major; writes all of the output, row-major.
pub type Compute = Box<dyn FnMut(&[&[f32]], &mut [f32]) + Send>;

/// What the bridge keeps for a computation.
struct Context {
    compute: Compute,
    input_lens: Vec<usize>,
    output_len: usize,
}

unsafe extern "C" {
    fn mlx_pipe_computed(
        result: *mut *mut c_void,
        inputs: *const *mut c_void,
        input_count: usize,
        shape: *const c_int,
        dimensions: usize,
        context: *mut c_void,
        run: unsafe extern "C" fn(*mut c_void, *const *const f32, *mut f32),
        drop: unsafe extern "C" fn(*mut c_void),
    ) -> c_int;
}

/// An f32 array of this shape on the CPU. `compute` is called once, on MLX's thread, when the array is evaluated;
/// a panic in it ends the process. `None` if MLX cannot make the array.
///
/// # Panics
/// An input that is not f32.
pub fn computed(inputs: &[&Array], shape: &[i32], compute: Compute) -> Option<Array> {
    assert!(inputs.iter().all(|input| input.dtype() == Dtype::Float32));
    let context = Box::new(Context {
        compute,
        input_lens: inputs.iter().map(|input| input.size()).collect(),
        output_len: shape.iter().map(|&dimension| dimension as usize).product(),
    });
    let handles: Vec<*mut c_void> = inputs.iter().map(|input| input.as_ptr().ctx).collect();
    let mut result = std::ptr::null_mut();
    // SAFETY: the handles are those of arrays that live; the bridge takes the context, and gives it to `run`
    // and once, last, to `drop_context`.
    let status = unsafe {
        mlx_pipe_computed(
            &mut result,
            handles.as_ptr(),
            handles.len(),
            shape.as_ptr(),
            shape.len(),
            Box::into_raw(context).cast(),
            run,
            drop_context,
        )
    };
    // SAFETY: a new array, in the form of mlx-c's handles, and nobody else's.
    (status == 0).then(|| unsafe { Array::from_ptr(mlx_sys::mlx_array { ctx: result }) })
}

/// # Safety
/// From the bridge: a context, as many inputs as it has lengths, and its output, all as long as it says.
unsafe extern "C" fn run(context: *mut c_void, inputs: *const *const f32, output: *mut f32) {
    // SAFETY: the caller's promise; MLX evaluates an array once, so nobody else has the context.
    let context = unsafe { &mut *context.cast::<Context>() };
    let inputs: Vec<&[f32]> = context
        .input_lens
        .iter()
        .enumerate()
        // SAFETY: the caller's promise; MLX keeps the inputs until this returns.
        .map(|(index, &len)| unsafe { std::slice::from_raw_parts(*inputs.add(index), len) })
        .collect();
    // SAFETY: the caller's promise. MLX has just allocated it for this array, and any bits are a float.
    let output = unsafe { std::slice::from_raw_parts_mut(output, context.output_len) };
    (context.compute)(&inputs, output);
}

/// # Safety
/// The context, once.
unsafe extern "C" fn drop_context(context: *mut c_void) {
    // SAFETY: from `Box::into_raw` in `computed`.
    drop(unsafe { Box::from_raw(context.cast::<Context>()) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_rs::Device;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn an_array_is_computed_once_when_it_is_evaluated_and_its_context_dropped() {
        Device::set_default(&Device::cpu());
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let double: Compute = Box::new(move |inputs, output| {
            counted.fetch_add(1, Ordering::SeqCst);
            for ((a, b), sum) in inputs[0].iter().zip(inputs[1]).zip(output) {
                *sum = 2.0 * a + b;
            }
        });
        let a = Array::from_slice(&[1f32, 2.0, 3.0], &[3, 1]);
        let doubled = computed(&[&a, &a], &[3, 1], double).unwrap();
        // Of an array of ours MLX makes another, and the other way round.
        let sum = doubled.add(&a).unwrap();
        let copy: Compute = Box::new(|inputs, output| output.copy_from_slice(inputs[0]));
        let copied = computed(&[&sum], &[3], copy).unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), 0);
        copied.eval().unwrap();
        assert_eq!(copied.as_slice::<f32>(), [4.0, 8.0, 12.0]);
        copied.eval().unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        drop((doubled, sum, copied));
        assert_eq!(Arc::strong_count(&calls), 1);
    }

    #[test]
    fn an_array_that_is_never_evaluated_drops_its_context_too() {
        let calls = Arc::new(());
        let held = Arc::clone(&calls);
        let never: Compute = Box::new(move |_, _| unreachable!("{held:?}"));
        drop(computed(&[], &[4, 4], never).unwrap());
        assert_eq!(Arc::strong_count(&calls), 1);
    }
}
