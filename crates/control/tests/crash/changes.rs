//! The commands of a schedule that change the graph at once: snapshots, transactions, handing images over, sizes.

use std::time::Duration;

use dolmen_types::{Options, Value};

use crate::schedule::{Play, Promise, Running};
use crate::world::{content, image_node, make_image};

impl Play {
    /// An overlay above the root, alone or with a backup of the same moment.
    pub(crate) async fn snapshot(&mut self) -> Result<(), String> {
        let node =
            if self.random.percent(80) { self.world.root().name.to_string() } else { self.some_image() };
        let Some(overlay) = self.overlay_of(&node).await? else { return Ok(()) };
        let snapshot = Options::new().with("node", node.as_str()).with("overlay", overlay.as_str());
        if self.random.percent(60) {
            let result = self.world.ask("blockdev-snapshot", snapshot).await?;
            self.done.count(if result.is_ok() { "blockdev-snapshot" } else { "refused" });
            return Ok(());
        }
        let mut actions = vec![action("blockdev-snapshot", snapshot)];
        let mut backup = None;
        if self.random.percent(70)
            && let Some(target) = self.target(None).await?
        {
            let id = self.name("backup");
            let o = self
                .job(&id)
                .with("device", node.as_str())
                .with("target", target.as_str())
                .with("sync", "full");
            let at = self.random.below(2) as usize;
            actions.insert(at, action("blockdev-backup", o));
            backup = Some((id, target));
        }
        let aborted = self.random.percent(25);
        if aborted {
            actions.push(action("abort", Options::new()));
        }
        let is_root = self.world.root().name.as_str() == node;
        let from = self.mark();
        let transaction = Options::new().with("actions", Value::List(actions));
        let result = self.world.ask("transaction", transaction).await?;
        let to = self.mark();
        if aborted && result.is_ok() {
            return Err("a transaction with an abort succeeded".into());
        }
        self.done.count(match result {
            Ok(_) => "transaction",
            Err(_) if aborted => "aborted",
            Err(_) => "refused",
        });
        if let (Ok(_), Some((id, target))) = (result, backup) {
            let promise = if is_root { Promise::Copy(target, from, to) } else { Promise::Partial };
            self.jobs.push(Running { id, what: "blockdev-backup", promise });
        }
        Ok(())
    }

    /// An empty image whose header names `node`'s image, with a node that is linked to nothing yet.
    async fn overlay_of(&mut self, node: &str) -> Result<Option<String>, String> {
        let graph = self.world.control.graph();
        let Some(below) = graph.node(node).cloned() else { return Ok(None) };
        drop(graph);
        let (size, below) = (below.size(), content(&below).name.to_string());
        let name = self.name("s");
        let cluster = if self.random.percent(70) { self.cluster() } else { 4096 };
        let image =
            make_image(&self.world.rt, cluster, size, Some(&below), &[]).await.map_err(|e| e.to_string())?;
        self.world.add_disk(&name, image);
        let added = self.world.ask("blockdev-add", image_node(&name).with("backing", Value::Null)).await?;
        Ok(added.ok().map(|_| name))
    }

    /// Hands an image to nobody, and takes it back.
    pub(crate) async fn hand_over(&mut self) -> Result<(), String> {
        let graph = self.world.control.graph();
        let images: Vec<String> = graph
            .nodes()
            .iter()
            .filter(|n| n.driver.kind().name == "qcow2" && !n.anonymous)
            .map(|n| n.name.to_string())
            .collect();
        drop(graph);
        let node = self.random.pick(&images).clone();
        let set = |active: bool| Options::new().with("node-name", node.as_str()).with("active", active);
        let given = self.world.ask("blockdev-set-active", set(false)).await?;
        self.done.count(if given.is_ok() { "deactivated" } else { "refused" });
        if given.is_err() {
            return Ok(());
        }
        self.world.rt.sleep(Duration::from_nanos(self.random.below(500_000))).await;
        for _ in 0..20 {
            match self.world.ask("blockdev-set-active", set(true)).await? {
                Ok(_) => return Ok(()),
                // Injected errors do not go on for ever.
                Err(e) if !self.world.errors => {
                    return Err(format!("'{node}' can't be taken back: {}", e.desc));
                }
                Err(_) => {}
            }
        }
        Err(format!("'{node}' can't be taken back"))
    }

    /// Another size for an image: one that nobody relies on may become smaller as well.
    pub(crate) async fn resize(&mut self) -> Result<(), String> {
        let graph = self.world.control.graph();
        let images: Vec<_> = graph
            .nodes()
            .iter()
            .filter(|n| n.driver.kind().name == "qcow2")
            .map(|n| (n.name.clone(), n.size()))
            .collect();
        drop(graph);
        let (node, size) = self.random.pick(&images).clone();
        let by = self.random.between(1, 64) * 512;
        let shrinks = self.random.percent(30);
        let size = if shrinks { size.saturating_sub(by).max(512) } else { size + by };
        let o = Options::new().with("node-name", node.as_str()).with("size", size);
        let result = self.world.ask("block_resize", o).await?;
        self.done.count(match result {
            Ok(_) if shrinks => "shrunk",
            Ok(_) => "grown",
            Err(_) => "refused",
        });
        if result.is_ok() {
            // A copy of another size is judged no more.
            for job in &mut self.jobs {
                if matches!(&job.promise, Promise::Copy(n, ..) | Promise::Follow(n, _) if *n == node.as_str())
                {
                    job.promise = Promise::Unseen;
                }
            }
        }
        Ok(())
    }
}

/// One action of a transaction.
fn action(name: &str, data: Options) -> Value {
    Options::new().with("type", name).with("data", data.into_value()).into_value()
}
