mm () 
{ 
    rm -rf $B/mod;
    cp -r $M $B/mod
}
