//! Which instruction set the kernels use: decided once, here and nowhere else.

use crate::arch::{Kernel, scalar::Scalar};
use std::sync::OnceLock;

/// An instruction set that kernels are written for, proven to be there.
#[derive(Debug, Clone, Copy)]
pub enum Isa {
    /// None: plain Rust.
    Scalar,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(crate::arch::avx2::Avx2),
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512(crate::arch::avx512::Avx512),
    /// NEON with dot products.
    #[cfg(target_arch = "aarch64")]
    Neon(crate::arch::neon::Neon),
    /// NEON with dot products and products of unsigned with signed bytes.
    #[cfg(target_arch = "aarch64")]
    NeonI8mm(crate::arch::neon::NeonI8mm),
}

/// The variable that names an instruction set to use instead of the best one.
pub const VARIABLE: &str = "MLX_PIPE_ISA";

impl Isa {
    /// All that this processor has, the plain one first and the best one last.
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(crate::arch::avx2::Avx2::new().map(Self::Avx2));
            found.extend(crate::arch::avx512::Avx512::new().map(Self::Avx512));
        }
        #[cfg(target_arch = "aarch64")]
        {
            found.extend(crate::arch::neon::Neon::new().map(Self::Neon));
            found.extend(crate::arch::neon::NeonI8mm::new().map(Self::NeonI8mm));
        }
        found
    }

    /// Its name, as [`VARIABLE`] takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => "neon",
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm(_) => "neon-i8mm",
        }
    }

    /// The one that this process uses: the best there is, or the one that [`VARIABLE`] names.
    ///
    /// # Errors
    /// The variable names one that this processor does not have: its names, to be told.
    pub fn chosen() -> Result<Self, String> {
        static CHOSEN: OnceLock<Result<Isa, String>> = OnceLock::new();
        CHOSEN
            .get_or_init(|| {
                let wanted = std::env::var(VARIABLE).ok().filter(|name| !name.is_empty());
                let isa = choose(wanted.as_deref())?;
                tracing::info!(isa = isa.name(), "CPU kernels");
                Ok(isa)
            })
            .clone()
    }

    /// Runs a kernel compiled for this instruction set.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            // SAFETY: needs no instruction set.
            Self::Scalar => unsafe { kernel.run::<Scalar>() },
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(proof) => proof.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(proof) => proof.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(proof) => proof.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm(proof) => proof.run(kernel),
        }
    }
}

fn choose(wanted: Option<&str>) -> Result<Isa, String> {
    let available = Isa::available();
    let found = match wanted {
        None => available.last(),
        Some(name) => available.iter().find(|isa| isa.name() == name),
    };
    found.copied().ok_or_else(|| {
        let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
        format!(
            "{VARIABLE}={}: this processor has {}",
            wanted.unwrap_or_default(),
            names.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_chosen_unless_one_is_named() {
        let best = Isa::available().last().unwrap().name();
        assert_eq!(choose(None).unwrap().name(), best);
        assert_eq!(choose(Some("scalar")).unwrap().name(), "scalar");
        let error = choose(Some("mmx")).unwrap_err();
        assert!(
            error.starts_with("MLX_PIPE_ISA=mmx: this processor has scalar"),
            "{error}"
        );
    }

    /// How a machine's tests say what they must have run on: see `scripts/test-aarch64`.
    #[test]
    fn the_one_that_the_environment_names_is_there() {
        let chosen = Isa::chosen().unwrap().name();
        if let Ok(wanted) = std::env::var(VARIABLE)
            && !wanted.is_empty()
        {
            assert_eq!(chosen, wanted);
        }
    }
}
