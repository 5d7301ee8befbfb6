//! Towline's simulator, scripted servers, namespace lab and benchmarks.

pub mod scripted;
