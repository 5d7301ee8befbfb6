//! Towline's simulator, scripted servers, namespace lab and benchmarks.

pub mod fuzz;
pub mod lab;
pub mod scripted;
pub mod sim;
