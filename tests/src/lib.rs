//! Towline's simulator, scripted servers, namespace lab and benchmarks.

pub mod cluster;
pub mod fuzz;
pub mod lab;
pub mod scripted;
pub mod scripted_api;
pub mod sim;
