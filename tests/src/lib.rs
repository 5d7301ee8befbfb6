//! Towline's simulator, scripted servers, namespace lab and benchmarks.

pub mod lab;
pub mod scripted;
pub mod sim;
