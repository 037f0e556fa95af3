//! Functions of sixteen lanes.

use crate::Isa;
use crate::arch::{Kernel, LANES, Simd};
use crate::math::{exp, swiglu};

struct Exp([f32; LANES]);
impl Kernel for Exp {
    type Output = [f32; LANES];
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Self::Output {
        let mut out = [0.0; LANES];
        unsafe { S::store(out.as_mut_ptr(), exp::<S>(S::load(self.0.as_ptr()))) };
        out
    }
}

struct Gate([f32; LANES]);
impl Kernel for Gate {
    type Output = [f32; LANES];
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Self::Output {
        let mut out = [0.0; LANES];
        unsafe {
            S::store(
                out.as_mut_ptr(),
                swiglu::<S>(S::load(self.0.as_ptr()), S::splat(1.0)),
            )
        };
        out
    }
}

#[test]
fn the_exponential_is_right_to_a_few_units_in_the_last_place_over_its_range() {
    for isa in Isa::available() {
        let mut worst = 0f64;
        for step in 0..110_000 {
            let x: [f32; LANES] =
                std::array::from_fn(|lane| -87.0 + step as f32 * 1.59e-3 + lane as f32 * 1e-4);
            for (x, found) in x.into_iter().zip(isa.run(Exp(x))) {
                let exact = f64::from(x).exp();
                worst = worst.max((f64::from(found) - exact).abs() / exact);
            }
        }
        println!("{}: {worst:.1e}", isa.name());
        assert!(worst < 3e-7, "{}: {worst:e}", isa.name());
    }
}

#[test]
fn the_exponential_ends_where_numbers_do() {
    for isa in Isa::available() {
        let ends = [
            0.0,
            -0.0,
            -87.1,
            -1e4,
            f32::NEG_INFINITY,
            -3e38,
            88.0,
            1e9,
            f32::INFINITY,
        ];
        let x: [f32; LANES] = std::array::from_fn(|lane| *ends.get(lane).unwrap_or(&1.0));
        let found = isa.run(Exp(x));
        assert_eq!(found[..6], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], "{}", isa.name());
        assert!(found[6..9].iter().all(|value| (1e38..3e38).contains(value)));
    }
}

#[test]
fn a_gate_of_any_size_gives_a_number() {
    for isa in Isa::available() {
        let gates = [-3e38, -1e4, -88.5, -1.0, 0.0, 1.0, 50.0, 3e38];
        let x: [f32; LANES] = std::array::from_fn(|lane| gates[lane % 8]);
        for (gate, found) in x.into_iter().zip(isa.run(Gate(x))) {
            let exact = f64::from(gate) / (1.0 + (-f64::from(gate)).exp());
            let close = (f64::from(found) - exact).abs() <= 1e-6 * exact.abs().max(1e-30);
            assert!(
                close || gate < -87.0 && found.abs() < 3.0,
                "{gate}: {found}, expected {exact}"
            );
        }
        assert!(
            isa.run(Gate([f32::NAN; LANES]))
                .iter()
                .all(|value| value.is_nan())
        );
    }
}
