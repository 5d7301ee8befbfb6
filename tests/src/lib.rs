//! The simulator, scripted servers, fuzz targets, namespace and VM labs, and benchmarks of Towline.

pub mod checkout;
pub mod cluster;
pub mod fuzz;
pub mod lab;
pub mod scripted;
pub mod scripted_api;
pub mod sim;
