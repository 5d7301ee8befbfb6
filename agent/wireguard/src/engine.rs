//! The choice of the engine at start.

use towline_aead::{Aead, Backend};

/// Choice between the engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// The batch engine where this CPU has a fast AEAD for batches, boringtun elsewhere.
    #[default]
    Auto,
    /// The batch engine, with ring where this CPU has no fast AEAD.
    Batch,
    /// boringtun, one packet at a time.
    Boringtun,
}

/// Engine that a node uses for all its peers. They may use any other: what they exchange is the
/// same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Engine(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Kind {
    #[default]
    Boringtun,
    Batch(Backend),
}

impl Engine {
    /// boringtun, which every CPU can run.
    pub const BORINGTUN: Self = Self(Kind::Boringtun);

    /// Returns the engine for this choice. Compares the AEAD with ring, which takes about a
    /// millisecond: call it once at start.
    pub fn select(choice: EngineChoice, aead: Aead) -> Self {
        match choice {
            EngineChoice::Boringtun => Self::BORINGTUN,
            EngineChoice::Batch => Self(Kind::Batch(Backend::select(aead))),
            EngineChoice::Auto => {
                let backend = Backend::select(aead);
                if backend.is_batched() { Self(Kind::Batch(backend)) } else { Self::BORINGTUN }
            }
        }
    }

    /// Returns the name, for status output: `batch` or `boringtun`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Boringtun => "boringtun",
            Kind::Batch(_) => "batch",
        }
    }

    /// Returns the name of the AEAD, for status output: that of [`Backend::name`].
    pub fn aead(self) -> &'static str {
        match self.0 {
            Kind::Boringtun => "ring",
            Kind::Batch(backend) => backend.name(),
        }
    }

    /// Returns whether received messages are decrypted in their own buffer, and best in large
    /// batches.
    #[inline]
    pub fn opens_in_place(self) -> bool {
        matches!(self.0, Kind::Batch(_))
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_the_batch_engine_where_it_is_faster() {
        let auto = Engine::select(EngineChoice::Auto, Aead::Auto);
        assert_eq!(auto.opens_in_place(), Backend::select(Aead::Auto).is_batched());
        assert_eq!(Engine::select(EngineChoice::Auto, Aead::Ring), Engine::BORINGTUN);
        let batch = Engine::select(EngineChoice::Batch, Aead::Ring);
        assert_eq!((batch.name(), batch.aead()), ("batch", "ring"));
        let boringtun = Engine::select(EngineChoice::Boringtun, Aead::Auto);
        assert_eq!((boringtun.name(), boringtun.aead()), ("boringtun", "ring"));
    }
}
