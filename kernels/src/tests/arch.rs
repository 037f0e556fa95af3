//! Every operation of every instruction set, against the plain one.

use super::{Numbers, assert_same_bits};
use crate::Isa;
use crate::arch::{Kernel, LANES, LARGEST_QUANTUM, QUAD_BYTES, Simd};

/// What all operations on floats make of three vectors.
struct Floats<'a>([&'a [f32; LANES]; 3]);
impl Kernel for Floats<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Vec<f32> {
        let halves: [u16; 2 * LANES] = std::array::from_fn(|lane| {
            let bits = self.0[lane / LANES][lane % LANES].to_bits();
            (bits ^ bits >> 16) as u16
        });
        unsafe {
            let [a, b, c] = self.0.map(|lanes| S::load(lanes.as_ptr()));
            let limit = self.0[1][0];
            let mut whole = [0; LANES];
            let limit_of_i16 = f32::from(i16::MAX);
            let number = |bits: u32| f32::from(bits as i16).max(-limit_of_i16);
            let numbers = self.0[0].map(|a| number(a.to_bits() ^ a.to_bits() >> 16));
            S::store_i16(whole.as_mut_ptr(), S::load(numbers.as_ptr()));
            assert_eq!(whole.map(f32::from), numbers);
            let results = [
                S::load_i16(whole.as_ptr()),
                a,
                S::splat(limit),
                S::load_f16(halves.as_ptr()),
                S::load_bf16(halves.as_ptr().add(LANES)),
                S::add(a, b),
                S::sub(a, b),
                S::mul(a, b),
                S::div(a, b),
                S::mul_add(a, b, c),
                S::max(a, b),
                S::min(a, b),
                S::max_magnitude(a, b),
                S::round(a),
                S::or_zero_below(a, limit, c),
            ];
            let mut out = vec![0.0; results.len() * LANES];
            for (result, to) in results.into_iter().zip(out.chunks_exact_mut(LANES)) {
                S::store(to.as_mut_ptr(), result);
            }
            out.extend([S::sum(a), S::sum(b)]);
            out
        }
    }
}

/// The largest lane, and `a` times powers of two.
struct Numbered<'a>(&'a [f32; LANES], &'a [f32; LANES]);
impl Kernel for Numbered<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Vec<f32> {
        let mut out = vec![0.0; LANES];
        unsafe {
            let (a, powers) = (S::load(self.0.as_ptr()), S::load(self.1.as_ptr()));
            S::store(out.as_mut_ptr(), S::scale_by_power(a, powers));
            out.push(S::largest(a));
        }
        out
    }
}

/// Words shifted and masked, as codes and as nibbles, times quanta.
struct Products<'a> {
    words: &'a [u32; LANES],
    quanta: &'a [f32; LANES],
}
impl Kernel for Products<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Vec<f32> {
        let mut out = Vec::new();
        unsafe {
            let mut quads = [0u8; LANES / 4 * QUAD_BYTES];
            S::pack(S::load(self.quanta.as_ptr()), quads.as_mut_ptr());
            let words = S::load_words(self.words.as_ptr().cast());
            let shifted = S::or(
                S::and(S::shift_right(words, 6), 0x0303_0303),
                S::shift_left(S::and(words, 0x0F0F_0F0F), 2),
            );
            let [low, high] = S::codes_of_nibbles(words);
            for codes in [S::codes(words), S::codes(shifted), low, high] {
                let mut sum = S::no_sum();
                for quad in 0..LANES / 4 {
                    sum = S::dot(sum, codes, quads.as_ptr().add(quad * QUAD_BYTES));
                }
                let mut lanes = [0.0; LANES];
                let finished = S::finish(sum, self.quanta.iter().sum());
                S::store(lanes.as_mut_ptr(), finished);
                out.extend(lanes);
            }
        }
        out
    }
}

/// Numbers of all sizes, halves between whole ones, the ends of the range, and what is no number.
fn any_float(numbers: &mut Numbers) -> f32 {
    let ends = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::MIN, 1e-40, -1e-45];
    match numbers.bits() % 4 {
        0 => f32::from_bits(numbers.bits() as u32),
        1 => (numbers.bits() % 64) as f32 / 2.0 - 16.0,
        2 => ends[(numbers.bits() % 7) as usize],
        _ => numbers.activation(),
    }
}

#[test]
fn every_operation_gives_the_bits_of_the_plain_one() {
    let mut numbers = Numbers::new(21);
    for _ in 0..2000 {
        let lanes: [[f32; LANES]; 3] =
            std::array::from_fn(|_| std::array::from_fn(|_| any_float(&mut numbers)));
        let finite: [f32; LANES] = std::array::from_fn(|_| numbers.activation());
        let powers = std::array::from_fn(|_| (numbers.bits() % 254) as f32 - 126.0);
        let words = std::array::from_fn(|_| numbers.bits() as u32);
        let quanta = std::array::from_fn(|_| (numbers.uniform() * LARGEST_QUANTUM).round());
        let all = |isa: Isa| {
            let mut found = isa.run(Floats(lanes.each_ref()));
            found.extend(isa.run(Numbered(&finite, &powers)));
            found.extend(isa.run(Products {
                words: &words,
                quanta: &quanta,
            }));
            found
        };
        for isa in Isa::available() {
            assert_same_bits(&all(isa), &all(Isa::Scalar), isa.name());
        }
    }
}
