use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use dolmen_rt::{Config, Pool, block_on_with};
use dolmen_types::ErrorKind;

use crate::{engines, on_both};

#[test]
fn timers_fire_in_order() {
    on_both(async |rt, _| {
        let order = Rc::new(RefCell::new(Vec::new()));
        for ms in [3u64, 1, 2] {
            let (order, r) = (order.clone(), rt.clone());
            rt.spawn(async move {
                r.sleep(Duration::from_millis(ms)).await;
                order.borrow_mut().push(ms);
            });
        }
        let start = rt.now();
        rt.sleep(Duration::from_millis(5)).await;
        assert!(rt.now().since(start) >= Duration::from_millis(5));
        while order.borrow().len() < 3 {
            rt.yield_now().await;
        }
        assert_eq!(*order.borrow(), [1, 2, 3]);
        // A timer that nobody waits for any more.
        assert!(rt.timeout(Duration::from_secs(3600), async { 1 }).await == Some(1));
        assert!(rt.timeout(Duration::from_millis(1), std::future::pending::<()>()).await.is_none());
    });
}

#[test]
fn tasks_wake_each_other_across_threads() {
    on_both(async |rt, io| {
        let (tx, rx) = async_channel();
        let core = io.handle();
        let thread = std::thread::spawn(move || {
            for i in 0..1000 {
                let tx = tx.clone();
                core.spawn(Box::new(move |_| Box::pin(async move { tx.send(i) })));
            }
        });
        let mut got: Vec<i32> = Vec::new();
        while got.len() < 1000 {
            got.extend(rx.take());
            rt.sleep(Duration::from_micros(50)).await;
        }
        thread.join().unwrap();
        assert_eq!(got, (0..1000).collect::<Vec<_>>());
    });
}

/// A channel just good enough for the test above.
fn async_channel() -> (Tx, Tx) {
    let tx = Tx::default();
    (tx.clone(), tx)
}

#[derive(Clone, Default)]
struct Tx(std::sync::Arc<std::sync::Mutex<Vec<i32>>>);
impl Tx {
    fn send(&self, i: i32) {
        self.0.lock().unwrap().push(i);
    }
    fn take(&self) -> Vec<i32> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

#[test]
fn a_pool_answers_and_ends() {
    for engine in engines() {
        let config = Config::default().with_engine(engine);
        let pool = Pool::start(&config, 2).unwrap();
        let cores = pool.cores().to_vec();
        let sum = block_on_with(&config, move |_| async move {
            let mut sum = 0;
            for i in 0..200u64 {
                let core = &cores[i as usize % 2];
                sum += core
                    .call(move |rt| async move {
                        rt.sleep(Duration::from_micros(10)).await;
                        i
                    })
                    .await
                    .unwrap();
            }
            sum
        });
        assert_eq!(sum.unwrap(), 199 * 100);
        let core = pool.cores()[0].clone();
        // A task that never ends does not keep the pool.
        core.spawn(Box::new(|_| Box::pin(std::future::pending())));
        pool.shutdown();
        let late = block_on_with(&config, move |_| async move { core.call(|_| async {}).await }).unwrap();
        assert_eq!(late.unwrap_err().kind(), ErrorKind::Cancelled);
    }
}

#[test]
fn tasks_that_still_run_are_dropped_at_the_end() {
    struct Told(Rc<Cell<u32>>);
    impl Drop for Told {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }
    for engine in engines() {
        let dropped = Rc::new(Cell::new(0));
        let d = dropped.clone();
        block_on_with(&Config::default().with_engine(engine), move |rt| async move {
            for _ in 0..3 {
                let told = Told(d.clone());
                rt.spawn(async move {
                    let _told = told;
                    std::future::pending::<()>().await;
                });
            }
            rt.yield_now().await;
            // One that was never polled.
            let told = Told(d.clone());
            rt.spawn(async move { drop(told) });
        })
        .unwrap();
        assert_eq!(dropped.get(), 4);
    }
}

#[test]
fn a_panic_comes_out_and_the_thread_can_go_on() {
    for engine in engines() {
        let config = Config::default().with_engine(engine);
        let c = config.clone();
        let result = std::panic::catch_unwind(move || {
            let _ = block_on_with(&c, |_| async { panic!("on purpose") });
        });
        assert!(result.is_err());
        assert_eq!(block_on_with(&config, |_| async { 5 }).unwrap(), 5);
    }
}
