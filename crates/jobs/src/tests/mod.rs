//! Tests of the framework, in the simulation.

mod life;
mod rig;
