//! The batch backends of x86-64.
//!
//! `unsafe` has two reasons here. A function that was compiled for certain CPU features is called
//! in [`Batch`], which exists only on a CPU that has them. A vector is read from or written to
//! memory in the small functions `load*` and `store*`, each of which takes a reference that covers
//! the bytes. All the rest, including every position in a packet, is safe code.

mod avx2;
mod avx512;
mod poly1305x4;
mod poly1305x8;
mod short;
#[cfg(test)]
mod tests;

use crate::lanes::Lane;
use crate::packets::Context;
pub(crate) use short::SHORT;

/// First 4 words of ChaCha20's state: "expand 32-byte k".
const SIGMA: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

/// Words of a key.
type KeyWords = [u32; 8];

/// Batch backend that this CPU can run. Only [`Batch::of_this_cpu`] creates it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Batch(Features);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Features {
    Avx512Ifma,
    Avx512Vl,
    Avx2,
}

impl Batch {
    /// Returns the backends whose instructions this CPU has and the operating system allows, the
    /// fastest first.
    pub(crate) fn of_this_cpu() -> impl Iterator<Item = Self> {
        // Every backend uses it for short packets.
        let avx2 = is_x86_feature_detected!("avx2");
        let avx512 = avx2 && is_x86_feature_detected!("avx512f");
        let ifma = avx512
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512ifma")
            && is_x86_feature_detected!("avx512vbmi2");
        let vl = avx512 && is_x86_feature_detected!("avx512vl");
        [(ifma, Features::Avx512Ifma), (vl, Features::Avx512Vl), (avx2, Features::Avx2)]
            .into_iter()
            .filter_map(|(has, features)| has.then_some(Self(features)))
    }

    /// Returns the name, for status output.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            Features::Avx512Ifma => "avx512-ifma",
            Features::Avx512Vl => "avx512vl",
            Features::Avx2 => "avx2",
        }
    }

    /// Seals at most [`crate::lanes::GROUP`] packets.
    #[allow(unsafe_code)]
    pub(crate) fn seal(self, key: &KeyWords, context: &Context<'_>, lanes: &mut [Lane<'_>]) {
        // SAFETY: the CPU has the features, since `of_this_cpu` created this value.
        unsafe {
            match self.0 {
                Features::Avx512Ifma => avx512::seal(key, context, lanes),
                Features::Avx512Vl => avx2::vl::seal(key, context, lanes),
                Features::Avx2 => avx2::plain::seal(key, context, lanes),
            }
        }
    }

    /// Opens at most [`crate::lanes::GROUP`] packets. `authentic` has one entry for each.
    #[allow(unsafe_code)]
    pub(crate) fn open(
        self,
        key: &KeyWords,
        context: &Context<'_>,
        lanes: &mut [Lane<'_>],
        authentic: &mut [bool],
    ) {
        // SAFETY: the CPU has the features, since `of_this_cpu` created this value.
        unsafe {
            match self.0 {
                Features::Avx512Ifma => avx512::open(key, context, lanes, authentic),
                Features::Avx512Vl => avx2::vl::open(key, context, lanes, authentic),
                Features::Avx2 => avx2::plain::open(key, context, lanes, authentic),
            }
        }
    }

    /// Seals a packet of at most [`SHORT`] bytes.
    #[allow(unsafe_code)]
    pub(crate) fn seal_short(self, key: &KeyWords, context: &Context<'_>, lane: &mut Lane<'_>) {
        // SAFETY: the CPU has AVX2, since `of_this_cpu` created this value.
        unsafe {
            short::seal(key, context, lane);
        }
    }

    /// Opens a packet of at most [`SHORT`] bytes. Returns whether it is authentic.
    #[allow(unsafe_code)]
    pub(crate) fn open_short(
        self,
        key: &KeyWords,
        context: &Context<'_>,
        lane: &mut Lane<'_>,
    ) -> bool {
        // SAFETY: the CPU has AVX2, since `of_this_cpu` created this value.
        unsafe { short::open(key, context, lane) }
    }
}
