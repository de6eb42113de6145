//! Makes an image, writes to it, and reads it back: `cargo run -p dolmen --example image`.

use dolmen::graph::OpenPolicy;
use dolmen::rt::Memory;
use dolmen::session::{self, Session};
use dolmen::types::{Options, Result};

fn main() -> Result<()> {
    let done = session::run(|rt| async move {
        // Opens nothing that an image names outside of its own directory, and guesses no format.
        let policy: OpenPolicy = session::beneath();
        let mut session = Session::new(&rt, dolmen::registry(), policy);
        session.create("example.qcow2", "qcow2", Options::new().with("size", 1u64 << 20)).await?;

        let options = session.named("example.qcow2", Some("qcow2"))?;
        let image = session.open(options, session::WRITE).await?;
        let buffer = Memory::from_slice(&[0xab; 4096]);
        image.write(0, &buffer.iovec(), Default::default()).await?;
        image.flush().await?;

        let back = Memory::zeroed(4096);
        image.read(0, &back.iovec(), Default::default()).await?;
        println!("{} bytes, and the first is {:#x}", image.size(), back.to_vec()[0]);
        session.close_image(image).await?;
        session.close().await
    });
    // The file was only for this.
    std::fs::remove_file("example.qcow2")?;
    done
}
